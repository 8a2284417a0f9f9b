#!/bin/bash
# A run that is queued again until it is finished: sbatch slurm.sh experiment=digits run.root=/shared/outputs
#SBATCH --job-name=hydra-runner
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

srun python -m runner "$@"
status=$?
if [ "$status" -eq 75 ]; then # interrupted: the same command continues
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
