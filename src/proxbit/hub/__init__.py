"""Publishing: the release of a model, its model card, and the upload to the Hub."""

import proxbit.hub.push_method  # noqa: F401
from proxbit import plugin
from proxbit.deprecation import renamed

_STATES = {name: (f"proxbit.{name}", getattr(plugin, name)) for name in plugin.__all__ if name.islower()}
__getattr__ = renamed(
    __name__, _STATES | {"ProxbitHfQuantizer": ("proxbit.plugin.ProxbitHfQuantizer", plugin.ProxbitHfQuantizer)}
)
