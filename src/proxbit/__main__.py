"""`python -m proxbit` is the program `proxbit`; launchers of many processes start it by that name."""

from proxbit_cli import main

if __name__ == "__main__":
    main()
