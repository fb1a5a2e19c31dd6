"""The shapes that are checked and timed: MLPs of real models, dense and pruned, and odd ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One MLP and the tokens it is given.

    ``width`` neurons are left of ``dense``; operations on compact weights see ``width`` alone.
    """

    model: str
    tokens: int
    hidden: int
    width: int
    dense: int

    def __str__(self) -> str:
        return f"{self.model} T={self.tokens} {self.hidden}x{self.width}"


@dataclass(frozen=True)
class Suite:
    """What one run goes through.

    ``models`` has hidden size and widths, the dense one first, the half-pruned one second: the
    order in which they are worth knowing. ``tokens`` caps a workload's tokens, ``variety`` how many
    numbers of them it is timed with. At ``odd`` shapes every dtype is checked. ``layer_bytes`` is
    how many bytes of weights decoding cycles through.
    """

    models: dict[str, tuple[int, tuple[int, ...]]]
    tokens: int
    variety: int
    odd: tuple[Shape, ...]
    layer_bytes: int


def _odd(tokens: int, hidden: int, width: int, dense: int) -> Shape:
    return Shape("odd", tokens, hidden, width, dense)


SUITES = {
    "models": Suite(
        models={
            "Qwen2.5-1.5B": (1536, (8960, 4480, 7168, 5888)),
            "Llama-3-8B": (4096, (14336, 7168, 11520, 9344)),
            "Qwen2.5-7B": (3584, (18944, 9472, 15104, 12288)),
        },
        tokens=4096,
        variety=4,
        odd=(
            _odd(1, 37, 53, 101),  # no stride divides by 16 bytes
            _odd(3, 136, 200, 264),  # divides by 16 bytes, by no block
            _odd(16, 264, 136, 520),
            _odd(17, 520, 1000, 2000),
            _odd(129, 192, 257, 515),
            Shape("Qwen2.5-1.5B", 1, 1536, 4480, 8960),
            Shape("Qwen2.5-1.5B", 512, 1536, 8960, 8960),
        ),
        layer_bytes=512 << 20,  # twice MI300X's last cache, ten times H100's L2
    ),
    "tiny": Suite(
        models={"tiny": (16, (32, 16))},
        tokens=17,
        variety=1,
        odd=(_odd(1, 13, 19, 23), _odd(5, 24, 40, 56)),
        layer_bytes=2 * 3 * 16 * 32 * 2,
    ),
}
