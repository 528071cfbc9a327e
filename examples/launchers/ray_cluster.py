"""bigbatch on the nodes of a Ray cluster: one torchrun on each node, with the GPUs of that node.

    python ray_cluster.py --nodes 2 --gpus 8 -- --data /shared/texts --model /shared/my-model --out /shared/runs/mine

What follows ``--`` are the options of `bigbatch train`. The nodes share a file system. Ray places one task on each
node, the first of which offers the rendezvous. Processes are those of torchrun, which restarts them when a rank is
lost, so that the run is resumed from its last checkpoint. Ctrl-C is forwarded to all ranks, which finish the update and
save.
"""

import argparse
import socket
import subprocess
import sys

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote(max_retries=0)
def address() -> tuple[str, int]:
    """Return the address of this node, and a port that is free on it."""
    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]


@ray.remote(max_retries=0)
def launch(words: list[str]) -> int:
    """Run torchrun on this node; return its exit code."""
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *words])
    try:
        return process.wait()
    except BaseException:  # the task is cancelled
        process.terminate()
        process.wait()
        raise


def main() -> int:
    """Start one torchrun on each node, and wait for all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each node; 0 for CPUs")
    parser.add_argument("--processes", type=int, help="processes on each node (default: one for each GPU, else 1)")
    parser.add_argument("--same-node", action="store_true", help="place all on one node, to try it")
    parser.add_argument("train", nargs="*", metavar="-- OPTIONS", help="options of bigbatch train")
    arguments = parser.parse_args()
    processes = arguments.processes or max(1, arguments.gpus)

    ray.init()
    bundle = {"CPU": 1} | ({"GPU": arguments.gpus} if arguments.gpus else {})
    group = placement_group([bundle] * arguments.nodes, strategy="PACK" if arguments.same_node else "STRICT_SPREAD")
    ray.get(group.ready())

    def placed(function: "ray.remote_function.RemoteFunction", node: int) -> "ray.remote_function.RemoteFunction":
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)
        return function.options(num_cpus=1, num_gpus=arguments.gpus, scheduling_strategy=strategy)

    host, port = ray.get(placed(address, 0).remote())
    words = ["--nnodes", str(arguments.nodes), "--nproc-per-node", str(processes), "--max-restarts", "3"]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{port}", "--rdzv-id", "bigbatch"]
    tasks = [
        placed(launch, node).remote(
            [*words, "--rdzv-conf", f"is_host={node == 0}".lower(), "-m", "bigbatch", "train", *arguments.train]
        )
        for node in range(arguments.nodes)
    ]
    try:
        return max(ray.get(tasks))
    except KeyboardInterrupt:
        for task in tasks:
            ray.cancel(task, force=False)
        ray.wait(tasks, num_returns=len(tasks))
        return 75


if __name__ == "__main__":
    sys.exit(main())
