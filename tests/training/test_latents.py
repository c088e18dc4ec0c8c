"""The cache against encoding as one goes."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import training.latents
from data.loader import Loader, Part
from model.weights import WeightsMismatch, load_vae
from runtime.exits import Interrupted
from runtime.files import read_json, sha256_path
from tests.training.conftest import begin
from training.latents import encode_part, refuse_other_encoders, run_latents
from training.stages import freeze_for
from training.supervised import batch_loss, load_parent

PARTS = ["drawn_image_edit", "drawn_text_to_image"]


def make(project, edit_params, **settings):
    edit_params(project, lambda params: params["latents"].update({"parts": PARTS, "precision": "float16", **settings}))
    with begin(project, "latents") as run:
        run_latents(run)
    return project / "outputs" / "latents"


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-6), ("float16", 2e-3)])
def test_losses_from_latents_are_those_from_images(project, edit_params, precision, tolerance):
    latents = make(project, edit_params, precision=precision)
    with begin(project, "alignment") as run:
        model = load_parent(run, "alignment")
        freeze_for(model, "alignment")
        mixture = read_json(project / "outputs" / "mixture" / "alignment.json")
        shards = project / "outputs" / "shards"
        images, cached = Loader(mixture, shards, 4), Loader(mixture, shards, 4, latents=latents)
        tasks = set()
        for one, other in islice(zip(images, cached, strict=True), 4):
            assert one.latents is None and other.latents is not None
            losses = [batch_loss(model, model, batch, run.params.alignment, "alignment") for batch in (one, other)]
            torch.testing.assert_close(*losses, rtol=tolerance, atol=0)
            tasks.add(one.task)
        assert tasks == {"image_edit", "text_to_image"}


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float16", 1e-2)])
@pytest.mark.parametrize("blind", [0.0, 0.5])
def test_what_the_vision_tower_saw_is_read_and_it_is_not_run(project, edit_params, monkeypatch, precision, tolerance, blind):
    latents = make(project, edit_params, precision=precision, vision=True)
    edit_params(project, lambda params: params["sft"].update(reference_dropout=blind, lora=None))
    with begin(project, "latents") as run:
        model = load_parent(run, "alignment")
        for head in (model.connector.projector_2, model.connector.projector_3):
            torch.nn.init.normal_(head.weight, std=0.5)  # fresh ones are zero, and then no condition matters
        mixture = read_json(project / "outputs" / "mixture" / "sft.json")
        images, cached = (Loader(mixture, project / "outputs" / "shards", 4, latents=folder) for folder in (None, latents))
        pairs = [pair for pair in islice(zip(images, cached, strict=True), 4) if pair[0].task == "image_edit"]
        config = run.params.sft
        expected = [batch_loss(model, model, batch, config, "sft") for batch, _ in pairs]

        def run_anyway(*arguments, **settings):
            raise AssertionError("the vision tower was run")

        monkeypatch.setattr(model.vlm.model.visual, "forward", run_anyway)
        for (_, batch), loss in zip(pairs, expected, strict=True):
            assert batch.latents.vision[0].dtype == precision
            torch.testing.assert_close(batch_loss(model, model, batch, config, "sft"), loss, rtol=tolerance, atol=0)
        with pytest.raises(AssertionError, match="the vision tower was run"):
            for batch, _ in pairs:
                batch_loss(model, model, batch, config, "sft")


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(project, edit_params):
    whole = sha256_path(make(project, edit_params))
    (project / "outputs" / "latents").rename(project / "first")

    class StopAfter:
        asked = 0

        def __bool__(self) -> bool:
            self.asked += 1
            return self.asked > 2

    with pytest.raises(Interrupted, match="the same command goes on"), begin(project, "latents", StopAfter()) as run:
        run_latents(run)
    kept = list((project / "outputs" / "runs" / "latents").rglob("*.tar"))
    assert len(kept) == 2 and not (project / "outputs" / "latents").exists()
    with begin(project, "latents") as run:
        run_latents(run)
    assert sha256_path(project / "outputs" / "latents") == whole


def test_a_part_published_already_is_taken_over_and_only_the_new_one_encoded(project, edit_params, monkeypatch):
    both = sha256_path(make(project, edit_params))
    latents = make(project, edit_params, parts=PARTS[:1])
    tars = {tar.name: tar.stat().st_ino for tar in (latents / PARTS[0]).glob("*.tar")}
    encoded = []
    real = training.latents.encode_part

    def noted(run, part, *rest):
        encoded.append(part.folder.name)
        real(run, part, *rest)

    monkeypatch.setattr(
        training.latents, "encode_part", lambda run, part, *rest: encoded.append(part.folder.name) or real(run, part, *rest)
    )
    assert sha256_path(make(project, edit_params)) == both and encoded == PARTS[1:]
    assert {tar.name: tar.stat().st_ino for tar in (latents / PARTS[0]).glob("*.tar")} == tars
    make(project, edit_params, precision="float32")
    assert encoded == [*PARTS[1:], *PARTS], "other settings are other latents"


@pytest.mark.parametrize(
    ("file", "tensor", "kind"),
    [("vae/diffusion_pytorch_model", "", "vae"), ("vlm/model", "visual.", "vision_tower"), ("vlm/model", "lm_head", "")],
)
def test_what_another_model_encoded_is_refused_by_name(project, edit_params, file, tensor, kind):
    latents = make(project, edit_params, vision=True)
    model = project / "outputs" / "foundation" / "model"
    refuse_other_encoders(latents, model)
    path = model / f"{file}.safetensors"
    weights = load_file(path)
    changed = next(name for name in weights if tensor in name)
    save_file(weights | {changed: weights[changed] + 1}, path)
    if not kind:
        return refuse_other_encoders(latents, model)  # LoRA merged into the language model leaves what the tower sees
    with pytest.raises(WeightsMismatch, match=rf"drawn_image_edit: made by {kind} .* Set latents\.parts to \[\]"):
        refuse_other_encoders(latents, model)


def test_ranks_share_the_tars_and_make_the_same_bytes(project, edit_params, tmp_path):
    alone = make(project, edit_params)
    with begin(project, "latents") as run:
        part = Part(project / "outputs" / "shards" / "drawn_image_edit")
        vae = load_vae(project / "outputs" / "foundation" / "model" / "vae", torch.float32).eval()
        for index in range(2):
            rank = SimpleNamespace(process_index=index, num_processes=2, is_main_process=index == 0)
            encode_part(run, part, tmp_path / "two", vae, {}, rank)
    names = sorted(tar.name for tar in (alone / "drawn_image_edit").glob("*.tar"))
    assert names == sorted(tar.name for tar in (tmp_path / "two").glob("*.tar"))
    for name in names:
        assert (alone / "drawn_image_edit" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_without_parts_nothing_is_encoded_and_training_reads_images(project, edit_params):
    edit_params(project, lambda params: params["latents"].update(parts=[]))
    with begin(project, "latents") as run:
        run_latents(run)
    assert [file.name for file in (project / "outputs" / "latents").iterdir()] == ["parts.json"]


def test_a_part_that_is_not_there_is_refused_before_anything_starts(edit_params, project):
    from runtime.params import ParamsError

    edit_params(project, lambda params: params["latents"].update(parts=["drawn"]))
    with pytest.raises(ParamsError, match=r"latents\.parts: names 'drawn', which data\.parts lacks"), begin(project, "latents"):
        pass
