"""What the engine ray consists of. The engine itself, with its options, is ``runtime/engines/ray.py``.

- needs: what Ray reserves for a task, and which nodes have it;
- packing: values and errors on their way between processes;
- worker: what runs in the workers;
- errors: Ray's errors in one line;
- cluster, versions, files: the nodes, whether they have the versions of this machine, and whether they can read files;
- connection: starts or joins a cluster, and leaves the process as it was;
- flight: tasks in groups, few at a time, results in order; knows no Ray;
- carriers, sums: what carries the groups: tasks, actors, tasks whose results are added up on the workers;
- helpers: the engine with which an actor has parts of its tasks done.
"""
