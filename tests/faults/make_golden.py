"""Write the golden run directory and plan of the version at hand: python -m tests.faults.make_golden

Once per version, before its release; `test_goldens.py` has later versions read them.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

import indistill_fx as ifx
from tests.faults import victims
from tests.unit.test_plan import edited, plan


def main() -> None:
    torch.set_num_threads(1)
    home = Path(__file__).parents[1] / "golden" / ifx.__version__
    home.mkdir(parents=True)
    edited(plan(), 0, kept=(0, 2, 3, 5)).save(home / "plan.json")
    child = os.fork()
    if child == 0:
        victims.gone_after_eight_steps(str(home / "run"))
    os.waitpid(child, 0)
    (home / "run" / ".lock").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
