"""What is drafted, round by round: the drafter and the length that bring most tokens per millisecond."""

from runtime.control.controller import Controller
from runtime.control.fixed import FixedControl
from runtime.control.plan import Control, Outcome, Plan

__all__ = ["Control", "Controller", "FixedControl", "Outcome", "Plan"]
