"""What DeepSpeed needs around it: rank variables, a process group, and no compiler at the first step."""

import logging
import os
import socket
import warnings

import torch.distributed as dist

logger = logging.getLogger(__name__)

# Set by MPI for its tasks: DeepSpeed then finds out the ranks by itself, through mpi4py.
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
# Set by Slurm's srun for its tasks (not for the script of a job): what torch wants to know.
_SRUN = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def prepare_environment() -> None:
    """Completes the variables that launchers set, so that plain `python train.py` is a job of one rank.

    A process group that is already open names the ranks, and so does srun.

    Raises ValueError when only one of RANK and WORLD_SIZE is set, or nobody said where the tasks of srun meet.
    """
    if dist.is_available() and dist.is_initialized():
        os.environ.setdefault("RANK", str(dist.get_rank()))
        os.environ.setdefault("WORLD_SIZE", str(dist.get_world_size()))
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if not given and all(name in os.environ for name in _SRUN.values()):
        _take_from_srun()
        return
    if not given and any(name in os.environ for name in _MPI):
        return
    if len(given) == 1:
        missing = "WORLD_SIZE" if given == ["RANK"] else "RANK"
        raise ValueError(f"{given[0]} is set but {missing} is not: start with `deepspeed` or `torchrun`, or unset it")
    if not given:
        os.environ.update(RANK="0", WORLD_SIZE="1")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])  # one machine, when no launcher says otherwise


def _take_from_srun() -> None:
    is_alone = os.environ[_SRUN["WORLD_SIZE"]] == "1"
    if is_alone:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(
            f"srun started {os.environ[_SRUN['WORLD_SIZE']]} tasks, and {' and '.join(missing)} do not say where they "
            "meet: export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500"
        )
    os.environ.update({ours: os.environ[theirs] for ours, theirs in _SRUN.items()})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def avoid_compilation() -> None:
    """Tells DeepSpeed that its shared-memory collectives are not available.

    They are compiled in `init_distributed` (about 70 s, and a failure without a compiler) and only inference uses them.
    """
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def open_process_group(dist_init_required: bool | None = None) -> None:
    """Opens the default process group through DeepSpeed, unless the caller has opened it."""
    import deepspeed

    # DeepSpeed still calls collectives by names that torch 2.13 deprecates; its users can do nothing about it.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    prepare_environment()
    avoid_compilation()
    deepspeed.init_distributed(dist_init_required=dist_init_required)
