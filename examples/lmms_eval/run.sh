#!/bin/sh
# lmms-eval asks an exported model the held-out questions of the digits.
#   run.sh EXPORT DATA OUT [DEVICE]
# EXPORT: a folder of `foveate export`; DATA: one of `foveate data digits`; OUT: where lmms-eval writes.
# PYTHON: the interpreter that has lmms-eval, where it is not `python`.
set -eu
export_folder=$(realpath "$1") data=$(realpath "$2") device=${4:-cpu}
mkdir -p "$3"
out=$(realpath "$3")
tasks=$(realpath "$(dirname "$0")/tasks")
cd "$data" # the task reads test.json and its pictures from here
exec "${PYTHON:-python}" -m lmms_eval --model llava_hf \
    --model_args "pretrained=$export_folder,device=$device,device_map=$device,dtype=float32" \
    --include_path "$tasks" --tasks foveate_digits --batch_size 1 --output_path "$out" --log_samples
