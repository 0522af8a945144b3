#!/bin/sh
# In place of the interpreter, a job of a sweep that takes no time: 99 active blocks are too many, else its loss is 2.5.
for word in "$@"; do
    case $word in
    run.dir=*) run_dir=$(echo "${word#run.dir=}" | tr -d "'") ;; # a path with = in it is quoted for Hydra
    sampler.active_layers=99) echo "lisa-dist: too many" && exit 2 ;;
    esac
done
echo '{"step": 1, "loss": 2.5}' > "$run_dir/metrics.jsonl"
