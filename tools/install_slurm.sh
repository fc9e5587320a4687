#!/usr/bin/env bash
# SLURM's daemons for tests/slurm, on Debian or Ubuntu: installed unless they are there, and none of them started.
#
#     tools/install_slurm.sh        as root, or where slurm-wlm and munge are installed already
set -euo pipefail

PATH="$PATH:/usr/sbin:/usr/local/sbin"
missing=()
for daemon in munged slurmctld slurmd; do
    command -v "$daemon" >/dev/null || missing+=("$daemon")
done
[ "${#missing[@]}" -eq 0 ] && exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "error: ${missing[*]} not installed. As root on Debian or Ubuntu this script installs them; elsewhere install" \
        "SLURM (slurmctld, slurmd, sbatch, srun) and munge by hand" >&2
    exit 1
fi

# The packages start their services. The tests start daemons of their own; on this machine none shall stay behind.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurm-wlm munge
