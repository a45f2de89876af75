"""`BinarizationConfig`: what is binarized and how, stored whole in `config.json`."""

import copy
import json
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from proxbit.errors import CheckpointError, ConfigError, UnknownNameError
from proxbit.foreign import printable
from proxbit.nn import ACCUMULATORS, DEFAULT_ACTIVATION_PAIR, Accumulator, check_activations
from proxbit.quantizers import PAIRS, QuantizerPair, RowUnits, get_pair, pair_key

__all__ = ["FORMAT_VERSION", "QUANT_METHOD", "STATES", "BinarizationConfig", "stored_kind"]

QUANT_METHOD = "proxbit"
FORMAT_VERSION = 1
STATES = ("latent", "packed")
MOST_PATTERNS, MOST_CHARACTERS = 4096, 255
LAYER_OPTIONS = ("activations", "activation_pair", "rprelu", "residual", "accumulator_bits", "accumulator_mode")
OF_THE_PAIR = ("pair_parameters", "normalize", "scale", "center")


def stored_kind(stored: Any, where: str) -> tuple[str, str | None]:
    """What a stored `quantization_config` makes of a model: its method, "float" for none; and the state, if proxbit's.

    Args:
        stored: as it was read.
        where: the model or its file, for the message.

    Raises:
        CheckpointError: if it is no configuration.

    Examples:
        >>> stored_kind({"quant_method": "proxbit", "state": "packed"}, "config.json")
        ('proxbit', 'packed')
    """
    if not isinstance(stored, dict | None):
        raise CheckpointError(f"The quantization_config of {where} is damaged: {stored!r} is no configuration.")
    method = (stored or {}).get("quant_method") or "float"
    return method, stored.get("state") if stored and method == QUANT_METHOD else None


def _as_json(parameters: Any) -> Any:
    """Parameters of a pair as `config.json` will hold them, in a dict of their own."""
    if not isinstance(parameters, dict | None):
        raise ConfigError(f"pair_parameters must be a dict, such as {{'levels': [-1, 0, 1]}}, not {parameters!r}.")
    try:
        return json.loads(json.dumps(parameters, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"pair_parameters must be JSON types, not {parameters!r}: {error}.") from error


def _check_lengths(name: str, patterns: Collection[Any]) -> None:
    """Check that patterns are as many, and as long, as names of layers may be: each is compared with each name."""
    if len(patterns) > MOST_PATTERNS:
        raise ConfigError(f"{name} has {len(patterns):,} patterns; there may be {MOST_PATTERNS:,}.")
    longest = max((len(pattern) for pattern in patterns if isinstance(pattern, str)), default=0)
    if longest > MOST_CHARACTERS:
        raise ConfigError(f"{name} has a pattern of {longest:,} characters; there may be {MOST_CHARACTERS}.")


@dataclass
class BinarizationConfig(QuantizationConfigMixin):
    """How a model is binarized. Each field's `metadata["help"]` says what it does.

    Raises:
        ConfigError: for a value that is not valid.
        UnknownNameError: for an unknown quantizer pair, unless the state is packed; the message lists the valid names.
        CheckpointError: if `format_version` is newer than this version of proxbit can read.

    Examples:
        >>> BinarizationConfig(weights="bnn++", modules_to_not_convert=["vit.layers.0.*"]).weights
        'bnn++'
    """

    weights: str | QuantizerPair = field(
        default="bnn++",
        metadata={"help": "The quantizer pair of the weights: a registered name, or a registered QuantizerPair."},
    )
    pair_parameters: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Parameters of the pair, where it takes any: {'levels': [-1, 0, 1]} for 'pc'."},
    )
    activations: str = field(
        default="float",
        metadata={
            "help": "What the activations of binarized linear layers are multiplied as: 'float' (or None); 'int8', "
            "rounded token by token; 'int4', with a learned step; 'sign', around learned thresholds. A layer behind a "
            "GELU or ReLU, whose input has one sign, gets 'uint4' for 'int4' and 'elastic', zero or a learned scale, "
            "for 'sign': see the overrides of model.config.quantization_config. Convolutions keep floats."
        },
    )
    activation_pair: str = field(
        default=DEFAULT_ACTIVATION_PAIR,
        metadata={"help": "The quantizer pair of 'sign' and 'elastic' activations: a registered name."},
    )
    rprelu: bool = field(
        default=False, metadata={"help": "Whether an RPReLU, with three learned numbers a channel, follows each layer."}
    )
    residual: bool = field(
        default=False,
        metadata={"help": "Whether the input of a layer is added to its output, where both are equally wide."},
    )
    accumulator_bits: int | None = field(
        default=None,
        metadata={
            "help": "Bits of the register that the sums of a layer end in, 2 to 24, simulated exactly; None: as many "
            "as it takes. For activations that are whole numbers."
        },
    )
    accumulator_mode: str = field(
        default="saturate", metadata={"help": "What becomes of sums that do not fit: 'saturate' or 'wrap'."}
    )
    overrides: dict[str, dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "Other choices for some linear layers, by pattern (fnmatch) of module names: {'*.mlp.fc2': "
            "{'activations': 'int8'}}. Fields: activations, activation_pair, rprelu, residual, accumulator_bits, "
            "accumulator_mode. Of two patterns the later one wins; a file has pairs of pattern and fields where their "
            "order is not that of the alphabet."
        },
    )
    learned_attention: list[str] | None = field(
        default=None,
        metadata={
            "help": "Patterns (fnmatch) of the attention modules that learn the scale of their probabilities, for runs "
            "as 'proxbit_binary'; the others take the mean of each row. None: those that run so when the model is "
            "binarized."
        },
    )
    include: list[str] | None = field(
        default=None,
        metadata={
            "help": "Patterns (fnmatch) of module names to binarize, as in model.named_modules(). A pattern also takes "
            "everything below the module it names. None: every Linear and Conv2d that is safe to binarize; that leaves "
            "out embeddings, stems, poolers, heads and depthwise convolutions."
        },
    )
    modules_to_not_convert: list[str] | None = field(
        default=None, metadata={"help": "Patterns (fnmatch) of module names to leave as they are."}
    )
    normalize: str | None = field(
        default=None,
        metadata={
            "help": "What a latent weight is divided by before F: its 'row's mean |w|, the 'tensor's, the 'std' of the "
            "row, or 'none'. None: the default of the pair, 'row' for most."
        },
    )
    scale: str | None = field(
        default=None,
        metadata={
            "help": "What F is multiplied by: 'ls', the row's least-squares factor; 'fixed', the same divisor. None: "
            "the default of the pair, 'ls' for most."
        },
    )
    center: str | None = field(
        default=None,
        metadata={
            "help": "Whether the row's mean is taken off before F: 'none'; 'remove'; 'restore', where it is added "
            "again after F and stored beside the scale. None: the default of the pair, 'none' for most."
        },
    )
    calibration: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "What the latents were fitted to by `calibrate`, if they were: how many images, and the mean "
            "relative error of the layers. proxbit sets it."
        },
    )
    state: str = field(
        default="latent",
        metadata={"help": "What the checkpoint holds: 'latent' weights or 'packed' bits. proxbit sets it."},
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of this format."})
    quant_method: str = field(default=QUANT_METHOD, metadata={"help": "Always 'proxbit'."})

    def __post_init__(self) -> None:
        if type(self.format_version) is not int or self.format_version < 1:
            raise CheckpointError(f"format_version must be a whole number from 1 on, not {self.format_version!r}.")
        if self.format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"This checkpoint has format_version {self.format_version}; this proxbit reads up to {FORMAT_VERSION}. "
                "Upgrade it: pip install --upgrade proxbit"
            )
        if self.quant_method != QUANT_METHOD:
            raise ConfigError(f"quant_method must be {QUANT_METHOD!r}, not {self.quant_method!r}.")
        if self.state not in STATES:
            raise ConfigError(f"state must be one of {', '.join(STATES)}; not {self.state!r}.")
        self.activations = "float" if self.activations is None else self.activations
        self._check_options("", {name: getattr(self, name) for name in LAYER_OPTIONS})
        self._check_overrides()
        self._resolve_pair()
        for name in ("include", "modules_to_not_convert", "learned_attention"):
            self._check_patterns(name)
        if not isinstance(self.calibration, dict | None):
            raise ConfigError(f"calibration must be what `calibrate` wrote, or None; not {self.calibration!r}.")

    def _resolve_pair(self) -> None:
        """Name the pair and its parameters, and fill in its default row units."""
        if not isinstance(self.weights, str | QuantizerPair):
            raise ConfigError(
                f"weights must be a quantizer pair, or the name of one, such as 'bnn++'; not {self.weights!r}. "
                f"Valid: {', '.join(sorted(PAIRS))}."
            )
        if isinstance(self.weights, QuantizerPair):
            get_pair(self.weights, self.pair_parameters)
            self.weights, self.pair_parameters = pair_key(self.weights)
        self.pair_parameters = _as_json(self.pair_parameters) or None
        try:
            units = self._default_units()
        except UnknownNameError as error:
            raise UnknownNameError(
                f"{error} A pair of your own must be registered under its name before its models are made or loaded: "
                f"proxbit.register_pair({self.weights!r}, pair)."
            ) from error
        units = units.override(normalize=self.normalize, scale=self.scale, center=self.center)
        self.normalize, self.scale, self.center = units.normalize, units.scale, units.center

    @property
    def units(self) -> RowUnits:
        """The row units of `normalize`, `scale` and `center`."""
        return RowUnits().override(normalize=self.normalize, scale=self.scale, center=self.center)

    def _default_units(self) -> RowUnits:
        # A packed file names its units, so it loads where its pair is unknown, or another one has taken the name.
        complete = None not in (self.normalize, self.scale, self.center)
        if self.state == "packed" and (complete or self.weights not in PAIRS):
            return self.quantizer_pair().units
        return get_pair(self.weights, self.pair_parameters).units

    def quantizer_pair(self) -> QuantizerPair:
        """The pair that the layers compute with: `bc` in the packed state, which holds signs, whatever trained them.

        Raises:
            UnknownNameError: for a name that is not registered.
            ConfigError: for parameters that the pair does not take.
        """
        return get_pair("bc") if self.state == "packed" else get_pair(self.weights, self.pair_parameters)

    def activation_quantizer_pair(self, name: str) -> QuantizerPair:
        """The pair of activations with two levels that has this name. The packed state needs none, and takes any name.

        Raises:
            UnknownNameError: for a name that is not registered.
        """
        return get_pair(DEFAULT_ACTIVATION_PAIR if self.state == "packed" else name)

    def _check_options(self, where: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if name in ("rprelu", "residual"):
                if not isinstance(value, bool):
                    raise ConfigError(f"{where}{name} must be True or False, not {value!r}.")
            elif name == "accumulator_bits":
                if value is not None:
                    Accumulator(value)
            elif not isinstance(value, str):
                raise ConfigError(f"{where}{name} must be a name, not {value!r}.")
            elif name == "accumulator_mode":
                ACCUMULATORS.get(value)
            elif name == "activations":
                check_activations(value)
            elif not (pair := self.activation_quantizer_pair(value)).binary:
                raise ConfigError(
                    f"{where}{name} must be a pair with the levels -1 and +1; {value!r} has {list(pair.levels)}."
                )

    def _check_overrides(self) -> None:
        example = "such as {'*.mlp.fc2': {'activations': 'int8'}}"
        if self.overrides is None:
            return
        pairs = self.overrides
        if isinstance(pairs, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            self.overrides = {pattern: changes for pattern, changes in pairs if isinstance(pattern, str)}
        if not isinstance(self.overrides, dict) or len(self.overrides) < len(pairs):
            raise ConfigError(f"overrides must be a dict of patterns, {example}; not {printable(repr(pairs))}.")
        _check_lengths("overrides", self.overrides)
        for pattern, changes in self.overrides.items():
            if not isinstance(pattern, str) or not isinstance(changes, dict) or not set(changes) <= set(LAYER_OPTIONS):
                raise ConfigError(
                    f"overrides must give each pattern a dict with fields of {', '.join(LAYER_OPTIONS)}, {example}; "
                    f"not {printable(repr(pattern))}: {printable(repr(changes))}."
                )
            self._check_options(f"overrides[{pattern!r}]: ", changes)
        self.overrides = copy.deepcopy(self.overrides) or None

    def _check_patterns(self, name: str) -> None:
        patterns = getattr(self, name)
        if patterns is None:
            return
        if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
            shown = printable(repr(patterns))
            raise ConfigError(f"{name} must be a list of patterns, such as ['vit.layers.*.mlp.fc2'], not {shown}.")
        _check_lengths(name, patterns)
        setattr(self, name, list(patterns))

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "BinarizationConfig | tuple[BinarizationConfig, dict[str, Any]]":
        """Read a configuration, such as the `quantization_config` of a `config.json`.

        Raises:
            CheckpointError: for a newer `format_version`, whose fields this version may not know.
            ConfigError: for unknown fields.
        """
        version = config_dict.get("format_version", FORMAT_VERSION)
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(config_dict) - known)
        if unknown and not (isinstance(version, int) and version > FORMAT_VERSION):
            raise ConfigError(f"Unknown fields {unknown} in a proxbit configuration. Valid: {sorted(known)}.")
        values = {**config_dict, **kwargs}
        config = cls(**{key: value for key, value in values.items() if key in known})
        unused = {key: value for key, value in kwargs.items() if key not in known}
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types, in a fixed order.

        Of `overrides` the later ones win, and transformers sorts the keys of what it writes: they are pairs of pattern
        and fields where that would change their order.
        """
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        if self.overrides is not None and list(self.overrides) != sorted(self.overrides):
            values["overrides"] = [[pattern, changes] for pattern, changes in self.overrides.items()]
        return copy.deepcopy(values)

    def get(self, field: str, default: Any = None) -> Any:
        """The value of a field, as of the dict that a file holds: `from_pretrained(..., config=model.config)` of
        transformers (5.15 to 5.23 at least) asks so.
        """
        return getattr(self, field, default)

    def replace(self, **changes: Any) -> "BinarizationConfig":
        """A copy with some fields changed.

        Another pair comes with its own row units and parameters: what belonged to the old pair goes back to the
        defaults, unless it is given as well.
        """
        name = changes.get("weights", self.weights)
        if isinstance(name, QuantizerPair):
            changes = {"pair_parameters": None} | changes
            name, _ = pair_key(name)
        if name != self.weights:
            changes = dict.fromkeys(OF_THE_PAIR) | changes
        return replace(self, **changes)
