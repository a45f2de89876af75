"""The files of a model: reading, checking and writing them. Nothing here knows the Hub."""
