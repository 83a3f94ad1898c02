"""Latent attention in its expanded spelling: keys and values are computed from the latent, head by head.

            c ----------- kv_b_proj
                          /       \\
    k = cat([k_nope, k_pe])        v          k_pe is the same for all heads; q = cat([q_nope, q_pe])

Hugging Face's DeepSeek V2 and V3, and DeepSeek's own code without absorption.
"""

from __future__ import annotations

from ..reasons import Refusal
from ..symbolic import product
from .axes import Dim, atoms_of, resolve, unify
from .descent import is_same_tensor
from .expansion import Expansion, prove_expansion, same_axes
from .latent_terms import Attempt, Term
from .region import Latent, Region, Roles


def find_expanded(region: Region, attempt: Attempt) -> Latent:
    """The latent behind k and v; raises Refusal, with `attempt.is_near` set if this comes near latent attention."""
    roles = attempt.frame.roles
    terms = attempt.terms
    candidates = [term for term in terms if term.varies_with(roles.heads)] if resolve(roles.heads) else terms
    if not candidates:
        raise Refusal("latent_not_linear", "the keys have no heads")
    attempt.is_near |= len(candidates) < len(terms)
    v_dims = attempt.frame.dims(region.v.dims)
    values = prove_expansion("the values", region.v.value, v_dims, tuple(roles.value_depth), roles)
    nope, keys = _per_head_term(candidates, values, roles, attempt)
    others = [term for term in terms if term is not nope]
    if any(term in candidates for term in others) and resolve(roles.heads):
        raise Refusal("latent_pe_per_head", "the part of the keys beside k_nope differs from head to head")
    if len(others) > 1:
        raise Refusal("latent_axes", f"the keys are put together from {len(terms)} parts")
    _check_products(region, keys, values)
    if not others and not _is_low_rank(keys):
        attempt.is_near = False
        raise Refusal("latent_full_rank", "keys and values are projections of a tensor no smaller than they are")
    q_nope, q_axis = nope.q.operand()
    unify(_axis_of(nope), q_axis)
    q_nope.factor = nope.factor
    k_nope, _ = nope.k.operand()
    latent = Latent(
        roles=Roles(
            roles.batch, roles.kv_heads, roles.groups, roles.query, roles.key, list(_axis_of(nope)), roles.value_depth
        ),
        rank=list(values.rank),
        rope=[],
        kv_c=values.latent,
        q_nope=q_nope,
        k_nope=k_nope,
        v=attempt.settled(region.v),
        w_uk=keys.weight,
        w_uv=values.weight,
    )
    if others:
        latent.q_pe, latent.k_pe, latent.rope = others[0].rope_operands()
    latent.opened = [p for p in (keys.product, values.product) if p.op == "opaque"]
    return latent


def _per_head_term(candidates: list[Term], values: Expansion, roles: Roles, attempt: Attempt) -> tuple[Term, Expansion]:
    """The one piece of k that is a map of the latent of v."""
    found, refusals = [], []
    for term in candidates:
        try:
            if not term.k.is_whole:
                raise Refusal("latent_not_linear", "the keys are a part of another tensor")
            keys = prove_expansion("the keys", term.k.value, term.k.dims, _axis_of(term), roles)
            is_same = is_same_tensor(keys.latent.value, values.latent.value)
            if is_same:
                unify(values.rank, keys.rank)
            if not (is_same and same_axes(keys.latent.dims, values.latent.dims)):
                attempt.is_near |= _is_low_rank(keys) and _is_low_rank(values)
                raise Refusal("latent_differs", "keys and values are expanded from different latents")
            attempt.is_near |= _is_low_rank(keys)
            found.append((term, keys))
        except Refusal as refusal:
            refusals.append(refusal)
    if len(found) == 1:
        return found[0]
    if not found:
        raise refusals[0]
    raise Refusal("latent_axes", f"{len(found)} parts of the keys are maps of the latent")


def _axis_of(term: Term) -> Dim:
    return term.k.channels


def _is_low_rank(expansion: Expansion) -> bool:
    """True if the latent is known to be smaller than what is expanded from it."""
    have = set(atoms_of(expansion.weight.dims))
    for cut in expansion.weight.cuts:
        have = (have - set(resolve(cut.before))) | set(resolve(cut.after))
    rank = product(atom.size for atom in resolve(expansion.rank))
    wide = product(atom.size for atom in have - set(resolve(expansion.rank)))
    return bool(rank.is_Integer and wide.is_Integer and rank < wide)


def _check_products(region: Region, *expansions: Expansion) -> None:
    """The products must round and carry gradients as the op does."""
    for expansion in expansions:
        made = expansion.product
        if made.dtype != region.spec.dtype:
            raise Refusal("latent_dtype", f"keys and values are expanded in {made.dtype}")
        if region.spec.requires_grad and any(value.grad_mode is not True for value in expansion.values):
            raise Refusal("latent_detached", "keys and values are expanded under no_grad, the attention is not")
