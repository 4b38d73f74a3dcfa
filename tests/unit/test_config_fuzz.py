"""Whatever a configuration is, it is read or refused in one line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ganscale.config import Config, field_names, load_config
from ganscale.errors import ConfigError

_VALUES = [
    *("", "null", "true", "no", "0", "-1", "1e400", ".nan", "-.inf", "1e-320", "0x1f", "1:30"),
    *("9" * 30, "9" * 5000, "2026-99-99", "2026-01-01", "!!binary a", "!!python/name:os.system"),
    *("[]", "{}", "[1, 2]", "{a: 1}", "{name: gan}", "{name: [1]}", "{1: 2}", "[[[]]]", "&a [*a]"),
    *(
        "{start: 1, end: 2, kimg: 3, shape: linear}",
        "{start: a}",
        "a b",
        "a=b",
        "'",
        '"',
        "{",
        "*a",
    ),
    *("\x00", "\n", "\u2028", "\ud83d", "\U0001f600", "%s", "../..", "s3://b/k", "x" * 10_000),
    *(
        "[" * 2000,
        "{a: " * 500,
        "<<: *a",
        "? [a]",
        "!!set {a}",
        "!!float x",
        "- a",
        "# a",
        "|",
        ">-",
    ),
]
_ODD_NAMES = [
    "",
    ".",
    "..",
    "a.",
    ".a",
    "model",
    "method",
    "training.x.y",
    "\n",
    "x" * 300,
    "1",
    "~",
]


class _Inputs:
    """A preset or a file, and overrides, drawn with a seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self._random = random.Random(seed)
        self._names = [*field_names(), *_ODD_NAMES]
        self._text = Config().to_yaml().encode()
        self._file = folder / "fuzzed.yaml"

    def draw(self) -> tuple[str, list[str]]:
        overrides = [self._override() for _ in range(self._random.choice((0, 1, 1, 2, 4)))]
        if self._random.random() < 0.5:
            return "quickstart", overrides or [self._override()]
        self._file.write_bytes(self._document())
        return str(self._file), overrides

    def _override(self) -> str:
        value = self._value()
        return f"{self._name()}{self._random.choice(('=',) * 9 + (':',))}{value}"

    def _name(self) -> str:
        name = self._random.choice(self._names)
        if name and self._random.random() < 0.2:
            at = self._random.randrange(len(name))
            name = name[:at] + self._random.choice("x._ \n") + name[at + 1 :]
        return name

    def _value(self) -> str:
        return self._random.choice(_VALUES)

    def _document(self) -> bytes:
        """Whole sections with odd values, or a valid document with bytes changed."""
        if self._random.random() < 0.5:
            lines = [f"{self._name()}: {self._value()}" for _ in range(self._random.randrange(4))]
            return "\n".join(lines).encode(errors="surrogatepass")
        # A slice, since reading the whole of it takes most of the time.
        start = self._random.randrange(len(self._text))
        start = self._text.rfind(b"\n", 0, start) + 1
        document = bytearray(self._text[start : start + 300])
        for _ in range(self._random.randrange(1, 6)):
            at = self._random.randrange(len(document))
            document[at : at + self._random.randrange(3)] = self._random.randbytes(1)
        return bytes(document)


def refusal(source: str, overrides: list[str]) -> str | None:
    """The message with which the configuration is refused; None where it is read."""
    try:
        config = load_config(source, overrides)
    except ConfigError as error:
        return str(error)
    assert Config.model_validate(config.model_dump()) == config
    return None


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_inputs", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_input_is_read_or_refused_in_one_line(num_inputs: int, tmp_path: Path) -> None:
    inputs = _Inputs(num_inputs, tmp_path)
    num_refused = 0
    for _ in range(num_inputs):
        source, overrides = inputs.draw()
        message = refusal(source, overrides)
        if message is not None:
            num_refused += 1
            assert len(message.splitlines()) == 1, (source, overrides)
            assert len(message) < 20_000, (source, overrides)
    assert 0.5 < num_refused / num_inputs < 0.999
