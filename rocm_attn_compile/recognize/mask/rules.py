"""The table of evaluation rules: ATen op name -> `rule(evaluator, value, call, index)`."""

from __future__ import annotations

from . import rules_create, rules_index, rules_join, rules_pointwise, rules_reduce, rules_view, rules_write

RULES = {
    **rules_create.RULES,
    **rules_index.RULES,
    **rules_join.RULES,
    **rules_pointwise.RULES,
    **rules_reduce.RULES,
    **rules_view.RULES,
    **rules_write.RULES,
}
