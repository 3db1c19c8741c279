"""All losses, and how one is built from its name.

Warm-up losses compare one feature of the student with one of the teacher; main losses compare everything two networks
deliver (`Outputs`) and add cross-entropy. Each class gives its formula, source and deviations.
"""

from indistill_fx.losses.base import EMBEDDING as EMBEDDING
from indistill_fx.losses.base import MainLoss as MainLoss
from indistill_fx.losses.base import Outputs as Outputs
from indistill_fx.losses.registry import MAIN_LOSSES as MAIN_LOSSES
from indistill_fx.losses.registry import WARMUP_LOSSES as WARMUP_LOSSES
from indistill_fx.losses.registry import main_loss as main_loss
from indistill_fx.losses.registry import warmup_loss as warmup_loss
