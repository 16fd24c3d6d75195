"""Train with the JustRL recipe: one file per run, one launch line.

    accelerate launch recipes/grpo_justrl.py                                        # tiny.yaml, a laptop is enough
    accelerate launch --config_file accelerate_configs/zero3_8gpu.yaml --num_processes 4 \\
        recipes/grpo_justrl.py --config recipes/justrl_deepseek_1.5b.yaml --managed_servers 4   # the paper's model on one node
    ... --dry_run                                                                   # print configuration and plan, exit

Every key of a recipe is an option too (`--learning_rate 5e-7`), and options win. `--help` shows those that are set most,
`--help_all` all of them.
"""

import time
from pathlib import Path

import yaml
from transformers.trainer_utils import get_last_checkpoint
from trl import get_peft_config

from justrl_trl.background import Background
from justrl_trl.distributed import leave_together
from justrl_trl.preflight.gpu_driver import check_gpu_driver
from justrl_trl.preflight.nodes import check_shared_folder
from justrl_trl.runs.arguments import parse_run
from justrl_trl.runs.folder import RunFolder
from justrl_trl.runs.heldout import HeldOut
from justrl_trl.runs.materials import find_materials
from justrl_trl.runs.progress import RolloutStepPrinter, run_plan
from justrl_trl.runs.recorder import RecordRun
from justrl_trl.runs.servers import connect, start_servers, wait_for_servers
from justrl_trl.runs.setup import check_machine
from justrl_trl.runs.summary import table_lines, write_summary
from justrl_trl.terminal import quiet_libraries, report_errors, say
from justrl_trl.training.rewards import reward_functions
from justrl_trl.training.trainer import JustRLTrainer


def main() -> None:
    started = time.monotonic()
    quiet_libraries()
    check_gpu_driver()

    # what to do
    run, training, model = parse_run(default_recipe=Path(__file__).with_name("tiny.yaml"))
    check_machine(training)
    folder = RunFolder(training.output_dir)
    found = find_materials(run, training, model, folder)
    if run.dry_run:
        say([yaml.safe_dump(folder.resolved(run, training, model), sort_keys=True)])
    say(run_plan(run, training, model, found))
    if found.disk:
        found.disk.check()
    if run.dry_run:
        return
    check_shared_folder(folder.path, training.distributed_state)

    # who does it: servers and trainer start at the same time
    servers, connecting = [], None
    if training.distributed_state.is_main_process:
        moved = folder.prepare(resume=bool(training.resume_from_checkpoint))
        say([f"an earlier run was moved to {moved}"] if moved else [])
        folder.write_config(run, training, model)
        if not training.rollout_servers:
            servers = start_servers(found.model_path, training, model.model_revision, folder.server_log, found.sharing)
        connecting = Background(lambda: connect(found.model_path, training, servers))
    if found.sharing and training.process_index == found.sharing.gpu:  # managed servers are on the machine of rank 0
        found.sharing.hold_trainer()
    training.model_init_kwargs = {
        "dtype": model.dtype,
        "revision": model.model_revision,
        "attn_implementation": found.attention,
        "use_safetensors": True,
    }
    recorder = RecordRun(folder, model.model_name_or_path, on_row=RolloutStepPrinter(training.num_rollout_steps))
    # the recorder comes last, so that its final figure includes the last scores
    callbacks = [HeldOut(folder), *([found.validation] if found.validation else []), recorder]
    trainer = JustRLTrainer(
        model=found.model_path,
        args=training,
        train_dataset=found.data.train,
        pool=None,
        heldout_dataset=found.data.heldout,
        reward_funcs=reward_functions(training),
        processing_class=found.tokenizer,
        callbacks=callbacks,
        peft_config=get_peft_config(model),
    )
    for callback in callbacks:
        callback.trainer = trainer
    trainer.pool = wait_for_servers(connecting, training.distributed_state)

    # do it
    checkpoint = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder.path) if checkpoint in ("True", "true") else checkpoint)

    # tell
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=run.dataset_name)
    if trainer.is_world_process_zero():
        seconds = time.monotonic() - started
        summary = write_summary(folder, seconds=seconds, world_size=training.world_size, zero_stage=found.zero_stage)
        last = get_last_checkpoint(folder.path)
        say(table_lines(summary, folder, Path(last) if last else None))
        trainer.pool.close()
    leave_together()


if __name__ == "__main__":
    with report_errors():
        main()
