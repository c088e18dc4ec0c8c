"""Rows of any shapes: how they are laid out changes nothing of what comes out."""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from model.dit import DeepGenTransformer
from model.joint_block import Batched, JointBlock

SHAPE = dict(
    sample_size=16,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    caption_projection_dim=32,
    pooled_projection_dim=20,
    pos_embed_max_size=12,
    dual_attention_layers=(0, 1),
    qk_norm="rms_norm",
)


def build(**settings: object) -> DeepGenTransformer:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return DeepGenTransformer(**(SHAPE | settings)).eval()


def ragged_rows() -> dict:
    """Four rows: two alike, one without references, one with two of other sizes."""
    draw = torch.Generator().manual_seed(1)

    def latent(height: int, width: int) -> torch.Tensor:
        return torch.randn(4, height, width, generator=draw)

    return {
        "latents": [latent(8, 8), latent(8, 8), latent(12, 6), latent(8, 8)],
        "prompt_embeds_BMD": torch.randn(4, 7, 24, generator=draw),
        "pooled_prompt_embeds_BD": torch.randn(4, 20, generator=draw),
        "timesteps_B": torch.tensor([10.0, 400.0, 700.0, 990.0]),
        "reference_latents": [[latent(6, 8)], [latent(6, 8)], [], [latent(8, 8), latent(4, 10)]],
        "prompt_lengths": [5, 5, 7, 3],
    }


def one_by_one(dit: DeepGenTransformer, rows: dict) -> list[torch.Tensor]:
    return [
        dit(
            rows["latents"][i][None],
            rows["prompt_embeds_BMD"][i : i + 1, : rows["prompt_lengths"][i]],
            rows["pooled_prompt_embeds_BD"][i : i + 1],
            rows["timesteps_B"][i : i + 1],
            tuple(reference[None] for reference in rows["reference_latents"][i]),
        )[0]
        for i in range(4)
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("settings", [{}, {"reference_offset": True}])
def test_grouped_equals_packed_equals_one_by_one(packed: bool, settings: dict):
    dit, rows = build(**settings), ragged_rows()
    with torch.no_grad():
        for ours, alone in zip(dit.forward_ragged(**rows, packed=packed), one_by_one(dit, rows), strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)


def test_packed_rows_teach_the_weights_what_grouped_rows_do():
    dit, rows = build(), ragged_rows()
    gradients = []
    for packed in (False, True):
        dit.zero_grad()
        sum(velocity.square().mean() for velocity in dit.forward_ragged(**rows, packed=packed)).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in dit.named_parameters() if parameter.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_masked_prompt_gives_what_the_prompt_cut_to_its_length_gives():
    dit, rows = build(), ragged_rows()
    latents, lengths = torch.stack([rows["latents"][0]] * 4), torch.tensor(rows["prompt_lengths"])
    mask = torch.arange(7) < lengths[:, None]
    with torch.no_grad():
        masked = dit(latents, rows["prompt_embeds_BMD"], rows["pooled_prompt_embeds_BD"], rows["timesteps_B"], (), mask)
        cut = dit.forward_ragged(**(rows | {"latents": list(latents), "reference_latents": [[]] * 4}))
    torch.testing.assert_close(masked, torch.stack(cut), rtol=1e-5, atol=1e-5)


def test_without_references_it_is_diffusers_own_transformer():
    dit, rows = build(), ragged_rows()
    plain = SD3Transformer2DModel(**SHAPE).eval()
    plain.load_state_dict(dit.state_dict())
    with torch.no_grad():
        theirs = plain(torch.stack(rows["latents"][:2]), rows["prompt_embeds_BMD"][:2], rows["pooled_prompt_embeds_BD"][:2],
                       torch.tensor([10.0, 400.0])).sample  # fmt: skip
        ours = dit(torch.stack(rows["latents"][:2]), rows["prompt_embeds_BMD"][:2], rows["pooled_prompt_embeds_BD"][:2],
                   torch.tensor([10.0, 400.0]))  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_position_table_beside_the_target_continues_the_table():
    dit = build(reference_offset=True)
    torch.testing.assert_close(dit._beside_target(8, 6, 0), dit.pos_embed.cropped_pos_embed(8, 6), rtol=0, atol=1e-5)


def test_the_offset_makes_the_order_of_references_count_and_the_released_grid_does_not():
    rows = ragged_rows()
    first, second = rows["latents"][0], rows["latents"][1]
    for offset in (False, True):
        dit = build(reference_offset=offset)
        swapped = [
            dit(
                rows["latents"][3][None],
                rows["prompt_embeds_BMD"][:1],
                rows["pooled_prompt_embeds_BD"][:1],
                rows["timesteps_B"][:1],
                tuple(reference[None] for reference in order),
            )
            for order in ((first, second), (second, first))
        ]
        same = torch.allclose(swapped[0], swapped[1], rtol=1e-4, atol=1e-5)
        assert same is not offset


def test_checkpointing_changes_memory_and_no_gradient():
    dit, rows = build(), ragged_rows()
    gradients = []
    for on in (False, True):
        dit.zero_grad()
        if on:
            dit.enable_gradient_checkpointing()
        sum(velocity.square().mean() for velocity in dit.forward_ragged(**rows)).backward()
        gradients.append(dit.pos_embed.proj.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_a_block_compiles_without_a_graph_break(masked: bool):
    torch.compiler.reset()
    block = JointBlock(dim=32, num_attention_heads=2, attention_head_dim=16, qk_norm="rms_norm", use_dual_attention=True)
    image, prompt, temb = torch.randn(2, 16, 32), torch.randn(2, 5, 32), torch.randn(2, 32)
    layout = Batched((torch.arange(21) < torch.tensor([[21], [18]]))[:, None, None] if masked else None)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")  # fullgraph raises at a break
    for ours, plain in zip(compiled(image, prompt, temb, layout), block(image, prompt, temb, layout), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
