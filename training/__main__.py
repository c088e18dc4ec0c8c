"""python -m training foundation | latents | alignment | sft | mr_grpo | evaluate STAGE | export: the stages of dvc.yaml; and replay."""

import argparse
import sys

from runtime.environment import set_environment


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description="The stages that need torch, as dvc.yaml calls them.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("foundation", help="gather and check the parts that training starts from")
    verbs.add_parser("latents", help="encode the images of latents.parts")
    verbs.add_parser("alignment", help="stage 1")
    verbs.add_parser("sft", help="stage 2")
    verbs.add_parser("mr_grpo", help="stage 3")
    verbs.add_parser("evaluate", help="score a stage's model").add_argument("stage", choices=["alignment", "sft", "mr_grpo"])
    verbs.add_parser("export", help="write the release folder and load it once in a fresh process")
    verbs.add_parser("replay", help="send to MLflow what waits in the run folders since it could not be reached")
    verbs.add_parser("train_foundation", help="train the small foundation anew (foundation/params.yaml)")
    arguments = parser.parse_args()
    set_environment()

    if arguments.verb == "train_foundation":
        from training.foundation_training import run_train_foundation

        run_train_foundation()
        return
    if arguments.verb == "replay":
        from runtime.stage import find_root, guard
        from training.spool import replay

        with guard("replay"):
            print(f"{replay(find_root())} events sent, nothing waits", flush=True)
        return
    if arguments.verb in ("latents", "alignment", "sft", "mr_grpo"):
        launch()

    from runtime.stage import open_stage

    name = (
        f"evaluation@{arguments.stage}"
        if arguments.verb == "evaluate"
        else {"export": "export_diffusers"}.get(arguments.verb, arguments.verb)
    )
    with open_stage(name) as run:
        if arguments.verb == "foundation":
            from training.foundation import run_foundation

            run_foundation(run)
        elif arguments.verb == "latents":
            from training.latents import run_latents

            run_latents(run)
        elif arguments.verb in ("alignment", "sft"):
            from training.supervised import run_supervised

            run_supervised(run, arguments.verb)
        elif arguments.verb == "mr_grpo":
            from training.mr_grpo import run_mr_grpo

            run_mr_grpo(run)
        elif arguments.verb == "evaluate":
            from training.evaluate import run_evaluation

            run_evaluation(run, arguments.stage)
        else:
            from training.export import run_export

            run_export(run)


def launch() -> None:
    """Start as many ranks as params.yaml asks for; returns in each."""
    from runtime.params import load_params
    from runtime.stage import find_root, guard
    from training.launch import start_ranks

    with guard(sys.argv[1]):
        start_ranks(load_params(find_root() / "params.yaml").launch, ["training", *sys.argv[1:]])


if __name__ == "__main__":
    main()
