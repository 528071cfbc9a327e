"""Names of the files and folders of a run directory."""

IDENTITY = "run-manifest.json"  # layout, run id, and what the run was started with; written once
CONFIG = "config.json"  # every setting, written once
METRICS = "metrics.jsonl"  # one line for each update
EVENTS = "events.jsonl"  # starts, stops and errors, for the report
SAMPLES = "samples.jsonl"  # texts that the model generated during the run
FINGERPRINTS = "fingerprints.jsonl"  # of gradients and parameters after each update, with --reproducible
QUARANTINE = "quarantine.jsonl"  # samples of skipped updates
TUNED_MICROBATCH = "microbatch.json"  # the micro-batch that `auto` chose
SHARDED_MICROBATCH = "sharded-microbatch.json"  # the micro-batch that `auto` predicted for a sharded model
SMALLER_MICROBATCH = "smaller.json"  # the micro-batch to restart with after out-of-memory
REFERENCE = "reference.safetensors"  # of --objective dpo: log-probabilities under the model that the run starts with
VERIFICATION = "verify.json"  # output of `bigbatch verify --json`
REPORT = "report.html"  # the page of `bigbatch report`
COMPARISON = "comparison.html"  # its page of several runs, in the first one
TENSORBOARD = "tensorboard"  # event files of --log tensorboard
LOCK = ".lock"  # held by the process that trains
MODEL = "model"  # the trained model and its tokenizer
ADAPTER = "adapter"  # of a run that trains LoRA adapters, instead: the adapters and the tokenizer
CHECKPOINTS = "checkpoints"
