"""Data sets, as batches that follow from (seed, epoch)."""

from indistill_fx.data.open import open_data as open_data
