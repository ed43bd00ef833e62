"""Operators that no stock back end has, or has fast enough: schema, numpy reference, implementations per back end."""

from plugins.operator_table import OPERATORS, Operator, operator

__all__ = ["OPERATORS", "Operator", "operator"]
