"""Which way interactions enter the stickworld DiT best: trains each variant alike for a while, and scores it.

    python benchmarks/stickworld_joint.py --steps 500 --scenes 25

docs/interaction.md has the table. Every variant sees the same batches and the same noise. "concatenated" is
here alone: the softmax is one over the attention's own keys and those of the interaction tokens, for which it
has to be computed anew with its log-sum-exp, so that no processor and no window goes on working beside it.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor

import interactdiff.interaction.transformer as transformer
from interactdiff.adapter import SiteInputs
from interactdiff.commands.arguments import quiet_libraries
from interactdiff.evaluation.world import evaluate_world
from interactdiff.interaction.fuser import KeysValues
from interactdiff.interaction.joint import JointCrossAttention
from interactdiff.interaction.site_state import SiteState
from interactdiff.sites import Site
from interactdiff.stickworld.render import SIZE
from interactdiff.training.run import load_config, make_recipe

CONFIG = Path(__file__).parent.parent / "training/configs/stickworld_dit_interaction.yaml"
VARIANTS: dict[str, dict[str, Any]] = {
    "between, all": {"structured": False, "action_region": "between"},
    "union, all": {"structured": False, "action_region": "union"},
    "between, structured": {"structured": True, "action_region": "between"},
    "union, structured": {"structured": True, "action_region": "union"},
    "one key a token": {"parts": 1, "structured": False, "action_region": "between"},
    "concatenated": {"structured": False, "action_region": "between"},
}


class ConcatenatedSite(transformer.CrossAttentionSite):
    """A joint attention whose softmax is over its own keys and the interaction tokens' together."""

    def __init__(self, site: Site, cross_attention: JointCrossAttention):
        super().__init__(site, cross_attention)
        site.module.processor = Concatenated(self)  # for good: the transformer is this benchmark's own

    def _edit(self, inputs: SiteInputs, gathered: Tensor) -> None:
        """Nothing is added beside the attention."""

    def merge(self, queries: Tensor, own: Tensor, own_lse: Tensor) -> Tensor:
        """One softmax of two, for the image's queries [B, heads, L, D], not rotated; gated."""
        state = self.state
        if state is None:
            return own
        scenes, positions = self.keys_values_and_positions(state, queries.device)
        keys, values = (t[..., :-1, :] for t in scenes)  # without the key of zeros: the own ones are there
        scores = (queries + positions) @ keys.mT * queries.shape[-1] ** -0.5
        if state.attn_mask is not None:
            scores = scores.masked_fill(~state.attn_mask[..., :-1], -torch.inf)
        share = torch.sigmoid(scores.logsumexp(-1) - own_lse)[..., None]
        read = scores.softmax(-1).nan_to_num() @ values
        return torch.lerp(own, read, share * (state.scale * self.cross_attention.alpha.tanh()))

    def keys_values_and_positions(self, state: SiteState, device: torch.device) -> tuple[KeysValues, Tensor]:
        """Of each batch row, all of which have to have a scene."""
        if state.tokens is not None:
            return self.cross_attention.keys_values(state.tokens), self._positions_of(state.grid, device)
        assert self._scenes is not None
        assert self._positions is not None
        return KeysValues(*(t[state.rows] for t in self._scenes)), self._positions[1]


class Concatenated:
    """Flux's attention, written out."""

    def __init__(self, site: ConcatenatedSite):
        self.site = site

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend, as the stock processor does but for the image's queries."""

        def heads(states: Tensor, *names: str) -> list[Tensor]:
            return [getattr(attn, name)(states).unflatten(2, (-1, attn.head_dim)) for name in names]

        q, k, v = heads(hidden_states, "to_q", "to_k", "to_v")
        q, k = attn.norm_q(q), attn.norm_k(k)
        state = self.site.state
        text = 0 if state is None else q.shape[1] - state.grid[0] * state.grid[1]
        image = q if encoder_hidden_states is not None else q[:, text:]
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.shape[1]
            tq, tk, tv = heads(encoder_hidden_states, "add_q_proj", "add_k_proj", "add_v_proj")
            pairs = ((attn.norm_added_q(tq), q), (attn.norm_added_k(tk), k), (tv, v))
            q, k, v = (torch.cat(both, 1) for both in pairs)
        q, k = (apply_rotary_emb(t, image_rotary_emb, sequence_dim=1) for t in (q, k))
        q, k, v, image = (t.transpose(1, 2) for t in (q, k, v, image))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        out = scores.softmax(-1) @ v
        merged = self.site.merge(image, out[:, :, text:], scores[:, :, text:].logsumexp(-1))
        out = torch.cat([out[:, :, :text], merged], 2).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        return attn.to_out[1](attn.to_out[0](out[:, text:])), attn.to_add_out(out[:, :text])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--scenes", type=int, default=25)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--set", nargs="+", default=[], help="overrides of the recipe's keys, key=value")
    args = parser.parse_args()
    quiet_libraries()
    site = transformer.CrossAttentionSite
    print(f"{args.steps} steps, {args.scenes} scenes, percent\n{'':24}{'HOI mAP':>9}{'boxes':>9}{'swap':>9}")
    for name in args.only:
        transformer.CrossAttentionSite = ConcatenatedSite if name == "concatenated" else site
        folder = Path("runs/joint") / name.replace(", ", "-").replace(" ", "-")
        config = load_config(CONFIG, [f"steps={args.steps}", *args.set])
        config["adapter"] |= VARIANTS[name]
        config |= {
            "output_dir": str(folder),
            "export_to": str(folder / "adapter"),
            "sample_every": args.steps,
        }
        make_recipe(config).train()
        table = evaluate_world(
            config["base"], config["export_to"], args.scenes, 0, 20, 16, "auto",
            guidance_scale=config["guidance_scale"], size=SIZE,
        )  # fmt: skip
        row = table["rows"]["adapter"]
        cells = (row["hoi_map"], row["box_acc"], table["action_swap"]["adapter"])
        print(f"{name:24}" + "".join(f"{100 * cell:9.1f}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
