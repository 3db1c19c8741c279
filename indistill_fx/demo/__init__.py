"""Every step on scikit-learn's digits, and the networks that the demo trains; saved runs name them as `indistill_fx.demo:…`."""

from indistill_fx.demo.networks import DigitsStudent as DigitsStudent
from indistill_fx.demo.networks import DigitsTeacher as DigitsTeacher
