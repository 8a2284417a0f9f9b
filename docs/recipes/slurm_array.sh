#!/bin/bash
# One run for each seed: sbatch --array=1-5 slurm_array.sh experiment=digits run.root=/shared/outputs
#SBATCH --job-name=hydra-runner-seeds
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

srun python -m runner "$@" "seed=$SLURM_ARRAY_TASK_ID"
status=$?
if [ "$status" -eq 75 ]; then # interrupted: the same command continues
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
