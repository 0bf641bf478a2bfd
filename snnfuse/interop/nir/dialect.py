"""How simulators step NIR's equations."""

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal


@dataclass(frozen=True)
class Dialect:
    """How a simulator steps NIR's equations, and what its files leave out. Change one by `dataclasses.replace`.

    Args:
      dt: of a step, in the unit of the file's time constants (NIR: seconds).
      decay: "euler", 1 - dt / tau, or "exponential", exp(-dt / tau).
      reset: "hard" (NIR's: v = v_reset) or "soft" (v = u - v_threshold; v_reset is not used); or snnTorch's soft reset, "late"
        (reset_delay=True) or "prompt" (reset_delay=False), whose equations are in `snnfuse.interop.snntorch`.
      detach: the reset is a constant in the gradient, for "hard" and "soft". "late" is detached and "prompt" is not.
      fires: ">" (NIR's) or ">=" the threshold. Exact in both: float32 has a next number.
      jumps: types of nodes whose input is added whole, not integrated over dt: of "LIF", "LI", "IF" and "I" (gain r),
        "CubaLIF" and "CubaLI" (gain w_in).
    """

    dt: float = 1e-4
    decay: Literal["euler", "exponential"] = "euler"
    reset: Literal["hard", "soft", "late", "prompt"] = "hard"
    detach: bool = False
    fires: Literal[">", ">="] = ">"
    jumps: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.dt > 0:
            raise ValueError(f"dt must be above 0; got {self.dt}")
        for name, choices in {
            "decay": ("euler", "exponential"),
            "reset": ("hard", "soft", "late", "prompt"),
            "fires": (">", ">="),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}; got {getattr(self, name)!r}")
        if unknown := set(self.jumps) - {"LIF", "LI", "IF", "I", "CubaLIF", "CubaLI"}:
            raise ValueError(f"jumps must name types of NIR neurons; got {sorted(unknown)}")


# for what each stands, see `snnfuse.interop.nir`
NIR = Dialect()
SNNTORCH = Dialect(reset="late")
SPIKINGJELLY = Dialect(fires=">=")
NORSE = Dialect(dt=1e-6, jumps=("IF", "CubaLIF"))
SINABS = Dialect(dt=1.0, decay="exponential", reset="soft", fires=">=", jumps=("LI",))


def require() -> ModuleType:
    """The package `nir`, or an ImportError that says which extra holds it."""
    try:
        return importlib.import_module("nir")
    except ImportError as error:
        raise ImportError(f'snnfuse.interop.nir needs nir ({error}): pip install "snnfuse[nir]"') from error
