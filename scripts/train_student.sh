#!/usr/bin/env bash
# Train the student of the embedded model without annotations: scripts/train_student.sh PHOTOS FOLDER
#
# About three hours of one core. Every step can be interrupted, and the same command continues. First scenes are drawn, and
# the decoder learns from these alone. Then it learns from photos, too, whose labels are the geometric mean of what it finds
# and of what the search finds. In use, ABDiv of the student's own pass weights its edges.
set -eu
photos=$1 folder=$2
mkdir -p "$folder"

trace-fast scenes "$photos" -o "$folder/scenes" --count 16500 --size 256

train() { # NAME OPTION...
  trace-fast distill --images "$photos" -o "$folder/$1" --size 128x128 --teacher-timestep 0 --decoder unet \
    --scenes "$folder/scenes" --window 128 --loss cross-entropy --rate 0 --reconstruction 0 --jitter 0.3 \
    --channel-shuffle 0.5 --batch 16 --dtype bfloat16 "${@:2}"
}
train from-scenes --scenes-share 1 --blank-attention 1 --labels soft --edge-weight 10 --decoder-rate 2e-3 --epochs 23
train student --scenes-share 0.5 --blank-attention 1 --labels combined --labels-student "$folder/from-scenes/student" \
  --labels-dir "$folder/labels" --init-from "$folder/from-scenes/student" --decoder-options abdiv=0.35 \
  --teacher-size 192x192 --limit 1506 --edge-weight 2 --decoder-rate 1e-3 --epochs 18
echo "$folder/student/student"
