"""What is drafted, round by round: the drafter and the length that bring most tokens per millisecond."""

from runtime.control.control import Control
from runtime.control.controller import Controller
from runtime.control.fixed import FixedControl

__all__ = ["Control", "Controller", "FixedControl"]
