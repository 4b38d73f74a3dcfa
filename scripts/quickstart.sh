#!/usr/bin/env bash
# From a fresh clone to a trained GAN: sets itself up, trains for a few minutes on two CPU workers
# through Ray, draws samples, verifies the checkpoints, writes a report and says where it is.
#   GANSCALE_CIFAR10   local copy of CIFAR-10; else it is downloaded; without a network the
#                      procedural CIFAR-shaped set is used, and a message says so
#   scripts/quickstart.sh training.total_kimg=500     settings are passed on (not name, not storage)
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

export WANDB_MODE="${WANDB_MODE:-offline}"
started=$SECONDS
ganscale train --config quickstart "$@"
ganscale checkpoint verify runs/quickstart

# What the report shows besides the run's own files.
shards="$(python -c 'import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))["data"]["shards"])' \
  runs/quickstart/config.yaml)"
ganscale sample runs/quickstart --num 64 --seed 1000 --out runs/quickstart/grid.png
ganscale shards show "$shards" --num 64 --out runs/quickstart/real.png
ganscale interpolate runs/quickstart --seeds 1,2,3,4,5 --frames 8 --out runs/quickstart/strip.png

# FID of 2,000 samples takes seconds on a GPU, but minutes on a CPU.
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  ganscale evaluate --run runs/quickstart --metrics fid --num 2000
fi
ganscale report runs/quickstart

cat << END

Done in $((SECONDS - started)) s. Look at:
  runs/quickstart/report.html       everything, in a browser: samples, curves, faults, what next
  runs/quickstart/grid.png          64 fresh images of the trained generator
  runs/quickstart/samples/          the same latents while it learned
  runs/quickstart/metrics.jsonl     the curves; W&B: .venv/bin/wandb sync runs/quickstart/wandb/offline-run-*
FID:    .venv/bin/ganscale evaluate --run runs/quickstart --metrics fid --num 2000
        (about five minutes on a CPU)
Go on:  .venv/bin/ganscale resume runs/quickstart training.total_kimg=500
END
