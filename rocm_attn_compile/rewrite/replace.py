"""Replace one recognised attention by the canonical op, or leave the graph exactly as it was."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx as fx

from .. import ops
from ..capture.trace import NodeTensor, Trace, Value
from ..reasons import Refusal
from ..recognize.labels import is_cast, is_view
from ..recognize.region import Operand, Region
from .alibi import emit_slopes
from .bias import emit_bias
from .bias_table import improve_lookups
from .builder import GraphBuilder
from .cache import emit_cache
from .canonical import from_layout, to_layout
from .dead_code import remove_dead
from .latent import Output, emit_latent, is_latent, output_of, take_cuts
from .layout import choose_out_layout, with_strides_of
from .masks import MaskArguments, emit_masks
from .returned import Returned, dtype_of, find_returned, refuse_read
from .row_sinks import with_row_sinks
from .tune import Tuned, Tuner

aten = torch.ops.aten


Check = Callable[[GraphBuilder, Region, Value, fx.Node], None]
"""Called with what was emitted, before it is used: builder, region, the value that is replaced, the new node."""


class Rewriter:
    """Rewrites sites of one trace. Sites are independent: each is applied whole or discarded whole.

    `check` may raise Refusal for a site. `tune` may give a site another `impl` argument; what it said of each region is
    kept in `tuned`.
    """

    def __init__(self, trace: Trace, check: Check | None = None, tune: Tuner | None = None) -> None:
        self.trace = trace
        self._check, self._tune = check, tune
        self.tuned: dict[Region, Tuned] = {}
        self.replaced: dict[fx.Node, fx.Node] = {}
        self._regions: list[Region] = []
        self._examples: dict[Any, Any] = {}
        self._written: dict[fx.Node, str] = {}

    def apply(self, region: Region, impl: str) -> fx.Node:
        """Emit the op for `region` and make every later reader use it.

        Raises:
            Refusal: A tensor the op needs is not available where the result is; the graph is unchanged.
        """
        output = output_of(region, impl)
        target, value = self._output_node(output.value)
        returned = find_returned(self.trace, region, target)
        place = target if returned is None else returned.place
        builder = GraphBuilder(
            self.trace, place, self.replaced, saves=region.spec.requires_grad, examples=self._examples
        )
        try:
            result, weights = self._emit(builder, region, output, target, value, impl, returned)
            if self._check is not None:
                self._check(builder, region, value, result)
                if returned is not None and weights is not None:
                    self._check(builder, region, returned.value, weights)
        except Exception:
            builder.discard()
            raise
        emitted = set(builder.emitted)
        for user in list(target.users):
            if user not in emitted:
                user.replace_input_with(target, result)
        self.replaced[target] = result
        if returned is not None and weights is not None:
            returned.give(weights, emitted)
            self.replaced.update(dict.fromkeys(returned.holders, weights))
        self._regions.append(region)
        return result

    def finish(self) -> list[str]:
        """Remove what the rewritten sites leave unused, check the graph and recompile it. Tells what else was done."""
        remove_dead(self.trace, [value for region in self._regions for value in _served(region)])
        told = improve_lookups(self.trace, self._regions)
        self.trace.graph_module.graph.lint()
        self.trace.graph_module.recompile()
        return told

    def _output_node(self, value: Value) -> tuple[fx.Node, Value]:
        """The first Dynamo node that holds the result, or a view or cast of it."""
        while True:
            nodes = [n for n, t in self.trace.tensors.items() if t.value is value]
            if nodes:
                return nodes[0], value
            users = [u for u in value.users if is_view(u) or is_cast(u)]
            # A write through the view gives what it is a view of another value, which no node shows.
            others = [u for u in value.users if u not in users and not (u.op == "view_scatter" and u.args[0] is value)]
            if len(users) != 1 or others:
                raise Refusal("output_hidden", "the result of the attention is inside a larger call")
            value = users[0]

    def _emit(
        self,
        builder: GraphBuilder,
        region: Region,
        output: Output,
        target: fx.Node,
        value: Value,
        impl: str,
        returned: Returned | None,
    ) -> tuple[fx.Node, fx.Node | None]:
        """The node for `target`, and that for the weights that something else reads."""
        spec, dims = region.spec, output.labels.of(value)
        layout = choose_out_layout(builder, target, output.groups, dims)
        masks, weights = emit_masks(builder, region), None
        if region.latent is not None and is_latent(impl):
            if spec.requires_grad:
                self._refuse_written(vars(masks).values())
            out = emit_latent(builder, region, region.latent, masks, layout, impl, self._operand)
        else:
            out, weights = self._attention(builder, region, masks, layout, impl)
        out = from_layout(builder, out, output.groups, dims, value.shape)
        if builder.example(out).dtype != value.dtype:
            out = builder.call(aten._to_copy.default, out, dtype=value.dtype)
        if spec.requires_grad and builder.is_written_later(target):
            out = builder.call(aten.clone.default, out)  # the op's backward reads what it gave
        out = with_strides_of(builder, out, target)
        if returned is not None and weights is not None:
            refuse_read(builder, region)
            weights = returned.brought_back(builder, region, weights)
        return out, weights

    def _attention(
        self, builder: GraphBuilder, region: Region, masks: MaskArguments, layout: str, impl: str
    ) -> tuple[fx.Node, fx.Node | None]:
        spec, roles = region.spec, region.roles
        heads = roles.heads
        q = self._operand(builder, region.q, [roles.batch, heads, roles.query, roles.depth], spec.dtype)
        cache: dict[str, Any] = {}
        kv_end = masks.kv_end
        if region.cache is not None:
            k, v, cache, kv_end = emit_cache(builder, region.cache, spec, kv_end)
        else:
            outer = [roles.batch, roles.kv_heads, roles.key]
            k = self._operand(builder, region.k, [*outer, roles.depth], spec.dtype)
            v = self._operand(builder, region.v, [*outer, roles.value_depth], spec.dtype)
        if region.second:
            q, k = self._concatenate(builder, region, q, k)
        bias = emit_bias(builder, region)
        if region.row_sinks is not None:
            k, v, bias = with_row_sinks(builder, region, region.row_sinks, k, v, bias)
        sinks = self._sinks(builder, region)
        seed = None
        if spec.dropout_p:
            seed = builder.call(aten.randint.low, -(2**63), 2**63 - 1, [1], dtype=torch.int64, device=builder.device)
        tensors = {
            "q": q, "k": k, "v": v, "attn_bias": bias, "attn_mask": masks.attn_mask, "key_mask": masks.key_mask,
            "kv_start": masks.kv_start, "kv_end": kv_end, "q_ids": masks.q_ids, "kv_ids": masks.kv_ids,
            "sinks": sinks, "dropout_seed": seed, "alibi_slopes": emit_slopes(builder, region),
        }  # fmt: skip
        if spec.requires_grad:
            self._refuse_written(node for name, node in tensors.items() if name not in ("q", "k", "v"))
        settings = {
            "softmax_scale": spec.softmax_scale, "logits_soft_cap": spec.logits_soft_cap,
            "band_lower": masks.band_lower, "band_upper": masks.band_upper, "dropout_p": spec.dropout_p,
            "empty_rows": spec.mask.empty_rows.value, "out_layout": layout,
        }  # fmt: skip
        if spec.returned_weights is not None:
            del tensors["dropout_seed"], settings["dropout_p"]
            settings["score_floor"], settings["weights_empty_rows"] = spec.score_floor, spec.returned_weights.value
            call = builder.call(
                ops.attention_with_weights, *tensors.values(), **settings, weights_dtype=dtype_of(region), impl=impl
            )
            self._keep_configuration(region, impl, "the weights are a result, too: that runs")
            return builder.call(operator.getitem, call, 0), builder.call(operator.getitem, call, 1)
        if spec.score_floor is not None:
            del settings["logits_soft_cap"]
            call = builder.call(
                ops.attention_floored, *tensors.values(), **settings, score_floor=spec.score_floor, impl=impl
            )
            self._keep_configuration(region, impl, "scores with a floor are computed")
            return builder.call(operator.getitem, call, 0), None
        if cache:
            self._keep_configuration(region, impl, "the cache is read")
        elif self._tune is not None:
            self.tuned[region] = self._tune(builder, impl, {**tensors, **settings}, spec.requires_grad)
            impl = self.tuned[region].impl
        call = builder.call(ops.attention, *tensors.values(), **settings, impl=impl, **cache)
        return builder.call(operator.getitem, call, 0), None

    def _keep_configuration(self, region: Region, impl: str, what: str) -> None:
        """Say, where tuning is asked for, that this site is not tuned."""
        if self._tune is not None:
            self.tuned[region] = Tuned(impl, [f"max-autotune: {what} with the shipped configuration"])

    def _refuse_written(self, arguments: Iterable[Any]) -> None:
        """Masks and biases of a call with a gradient must not come from a number that the graph counts up.

        AOTAutograd's partitioner may compute them again in the backward, from the input as it is then.
        """
        for node in arguments:
            name = self._written_input(node) if isinstance(node, fx.Node) else ""
            if name:
                raise Refusal(
                    "mask_input_written",
                    f"the mask or bias is made from the input {name}, which the graph writes to: PyTorch may make it "
                    "again in the backward, from what that holds then",
                )

    def _written_input(self, last: fx.Node) -> str:
        """The name of an input, no float, that `last` is computed from and that is written in the graph; or ""."""
        known, path = self._written, [last]
        while path:
            node = path[-1]
            inputs = [i for i in node.all_input_nodes if i not in known]
            if node not in known and inputs:
                path += inputs
                continue
            path.pop()
            tensor = self.trace.tensors.get(node)
            is_written = tensor is not None and node.op in ("placeholder", "get_attr") and _is_counted(tensor)
            known[node] = node.name if is_written else next(filter(None, (known[i] for i in node.all_input_nodes)), "")
        return known[last]

    def _operand(self, builder: GraphBuilder, operand: Operand, groups: list, dtype: torch.dtype) -> fx.Node:
        node, dims = take_cuts(builder, builder.tensor(operand.value), operand)
        node = to_layout(builder, node, dims, groups, [True] * len(groups))
        if builder.example(node).dtype != dtype:
            node = builder.call(aten._to_copy.default, node, dtype=dtype)
        for factor, divides in operand.factors:
            other = to_layout(builder, builder.tensor(factor.value), factor.dims, groups, [False] * 4)
            op = aten.div.Tensor if divides else aten.mul.Tensor
            node = builder.call(op, node, other)
            if builder.example(node).dtype != dtype:
                node = builder.call(aten._to_copy.default, node, dtype=dtype)
        if operand.factor != 1:
            node = builder.call(aten.mul.Tensor, node, operand.factor)
        return node

    def _concatenate(self, builder: GraphBuilder, region: Region, q: fx.Node, k: fx.Node) -> tuple[fx.Node, fx.Node]:
        roles, dtype = region.roles, region.spec.dtype
        queries, keys = [q], [k]
        for q2, k2, depth in region.second:
            queries.append(self._operand(builder, q2, [roles.batch, roles.heads, roles.query, depth], dtype))
            keys.append(self._operand(builder, k2, [roles.batch, roles.kv_heads, roles.key, depth], dtype))
        return builder.call(aten.cat.default, queries, -1), builder.call(aten.cat.default, keys, -1)

    def _sinks(self, builder: GraphBuilder, region: Region) -> Any:
        if region.sinks is None:
            return None
        return to_layout(builder, builder.tensor(region.sinks.value), region.sinks.dims, [region.roles.heads], [True])


def _is_counted(tensor: NodeTensor) -> bool:
    return bool(tensor.storage.write_times) and not tensor.value.dtype.is_floating_point


def _served(region: Region) -> list[Value]:
    """What the site consists of, and what its latent form, or reading from its cache, no longer needs."""
    values = list(region.values)
    for inner in (region.latent, region.cache):
        values += inner.values if inner is not None else ()
    return values
