"""Evaluate a model as the paper does: N responses to every problem of nine benchmarks, graded, with errors, beside the paper.

    python recipes/evaluate.py --model hbx/JustRL-DeepSeek-1.5B --managed_servers 8    # the paper's nine, a server on each GPU
    python recipes/evaluate.py --model hbx/JustRL-DeepSeek-1.5B --benchmarks aime24,math500 --data_dir JustRL/data --limit 5
    python recipes/evaluate.py --model embedded:tiny-base --benchmarks embedded:arithmetic --max_new_tokens 64  # on a laptop
    ... --benchmarks problems.jsonl --samples 8                                          # problems of your own
    ... --rollout_servers http://10.0.0.5:8000 http://10.0.0.6:8000                      # running servers
    ... --verifier_server http://10.0.0.7:8000  # CompassVerifier-3B decides on what the rule rejects, as in the paper's tables

Every response is on disk the moment it arrives. However it ends (Ctrl-C, kill -9, a dead node), the same command goes on and
asks only for what is missing; with another --grader, or a verifier, it grades again and does not sample. --dry_run plans.
"""

import sys
import time

from justrl_trl.errors import ServerError
from justrl_trl.evaluation.arguments import EvaluateArguments, evaluation_plan, folder_of, parse_evaluation, settings_of
from justrl_trl.evaluation.grades import grade_all, verify_all
from justrl_trl.evaluation.model import EvaluatedModel, find_model
from justrl_trl.evaluation.results import write_results
from justrl_trl.evaluation.sampling import (
    Progress,
    Request,
    Response,
    check_fits,
    eval_sampling,
    prompt_ids,
    requests_of,
    sample_all,
)
from justrl_trl.evaluation.servers import connect, devices, start_servers
from justrl_trl.evaluation.store import SampleStore
from justrl_trl.evaluation.tasks import find_tasks
from justrl_trl.evaluation.verifier import Verifier
from justrl_trl.preflight.gpu_driver import check_gpu_driver
from justrl_trl.terminal import quiet_libraries, report_errors


def main() -> None:
    started = time.monotonic()
    quiet_libraries()
    check_gpu_driver()

    # what to do
    args = parse_evaluation()
    tasks = find_tasks(args.benchmarks, data_dir=args.data_dir, samples=args.samples, limit=args.limit)
    model = find_model(args.model, args.model_revision)
    requests = [one for task in tasks for one in requests_of(task, prompt_ids(model.tokenizer, task.problems), args.seed)]
    if model.context:
        check_fits(requests, args.max_new_tokens, model.context, f"The model {args.model}")
    settings = settings_of(args, model.slug, model.weights, model.stop_token_ids)
    store = SampleStore(folder_of(args, settings), settings)
    missing = store.missing(requests)
    needed = missing and not args.rollout_servers
    places = devices(args) if needed else []
    print("\n".join(evaluation_plan(args, tasks, requests, len(missing), places, model.weights, store.folder)), flush=True)
    if args.dry_run:
        return
    verifier = None
    if args.verifier_server:
        options = {"protocol": args.verifier_protocol, "concurrency": args.verifier_concurrency}
        verifier = Verifier(args.verifier_server, args.verifier_model, **options)
        verifier.check()

    # do it
    try:
        with store:
            if store.cut:
                print(f"cut off {store.cut:,} bytes of a line that was being written when an earlier run ended", flush=True)
            if missing := store.missing(requests):
                sample(args, model, store, requests, missing)
            with Progress("grading", len(requests), "responses") as progress:
                grades, counters = grade_all(store, tasks, args.grader, args.grading_workers or None, progress.update)
            if verifier:
                with Progress("verifying", sum(not grade.rule for grade in grades), "responses") as progress:
                    verify_all(store, tasks, grades, verifier, progress.update)
            print(write_results(args, store, tasks, grades, counters, verifier, time.monotonic() - started), flush=True)
    except (ServerError, KeyboardInterrupt) as error:
        left = len(store.missing(requests))
        kept = (
            f"{len(requests) - left:,} of {len(requests):,} samples are in {store.folder}; the same command goes on from there."
        )
        if isinstance(error, ServerError):
            raise ServerError(f"{error}\n{kept}") from error
        print(f"\ninterrupted. {kept}", flush=True)
        sys.exit(130)


def sample(
    args: EvaluateArguments, model: EvaluatedModel, store: SampleStore, requests: list[Request], missing: list[Request]
) -> None:
    """Ask for what is missing; a response is on disk before the next one is looked at."""
    longest = max(len(request.prompt) for request in requests)
    servers = [] if args.rollout_servers else start_servers(model, args, store.folder, longest + args.max_new_tokens)
    pool = connect(model, args, servers, missing)
    sampling = eval_sampling(
        model.stop_token_ids, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p
    )

    def note(rate: float) -> str:
        return f"{rate:,.0f} tok/s, {sum(m.in_flight for m in pool.members)} running on {len(pool.live())} server(s)"

    def keep(response: Response) -> None:
        text = model.tokenizer.decode(response.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        request, why = response.request, "length" if response.truncated else "stop"
        size = len(response.ids)
        store.add(request.key, request.prompt_hash, size, seed=request.seed, finish_reason=why, completion=text)
        progress.update(1, size)

    try:
        for request in requests:
            if request.key in store.stored:  # its problem's other samples: the longest go first
                pool.learn_length(request.prompt, store.stored[request.key].tokens)
        with Progress("sampling", len(missing), "samples", note) as progress:
            sample_all(pool, missing, sampling, keep)
    finally:
        pool.close()


if __name__ == "__main__":
    with report_errors():
        main()
