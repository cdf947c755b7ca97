# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Snapshots of a guest that runs under KVM, and snapshots that are refused while it runs on.

WRITERS="first second third"

# progress WRITER: the number of records that it has told. The last line may not be whole yet.
progress() {
    told_so_far=$(sed '$d' /tmp/guest.log | tr -d '\r' | sed -n "s/^$1 \([0-9][0-9]*\)$/\1/p" | tail -n 1)
    echo "${told_so_far:-0}"
}

all_progress() {
    for writer in $WRITERS; do progress "$writer"; done | tr '\n' ' '
}

# wait_for_more RECORDS...: until every writer has told of more records than that.
wait_for_more() {
    for writer in $WRITERS; do
        until [ "$(progress "$writer")" -gt "$1" ]; do
            pidof qemu-system-x86_64 >/dev/null || fail "the guest ended before" >&2
            usleep 100000
        done
        shift
    done
}

# Takes the snapshots while the guest writes; the records that were durable before each are kept.
take_snapshots() {
    last="0 0 0"
    for number in $(seq "$snapshots"); do
        # shellcheck disable=SC2086 # three numbers
        wait_for_more $last
        all_progress >"/tmp/before$number"
        pcow-img snapshot "$DAX/live.pcow" "s$number" >&2
        last=$(all_progress)
    done
    # shellcheck disable=SC2086
    wait_for_more $last
    echo stop
}

# Boots a clone of snapshot number $1, and compares with what each writer had told before.
snapshot_is_consistent() {
    pcow-img create --base "$DAX/live.pcow@s$1" --allocation-unit 64K "$DAX/snapshot.pcow"
    guest "$DAX/snapshot.pcow" records count
    # shellcheck disable=SC2046
    set -- $(cat "/tmp/before$1")
    for writer in $WRITERS; do
        found=$(told "/mnt/$writer")
        echo "$writer: $found records, and $1 were durable before"
        [ "$found" -ge "$1" ] || fail "a durable record is missing"
        shift
    done
    rm -r "$DAX/snapshot.pcow"
}

# guest_is_snapshotted SNAPSHOTS
guest_is_snapshotted() {
    snapshots=$1
    pcow-img create --allocation-unit 64K "$DAX/live.pcow" 256M
    write_records "$DAX/disk"
    machine="-drive if=virtio,format=raw,aio=native,cache=none,readonly=on,file=$DAX/disk"
    beside=take_snapshots
    guest "$DAX/live.pcow" records write
    beside=
    machine=
    pcow-img list "$DAX/live.pcow"
    pcow-img check "$DAX/live.pcow"
    for number in $(seq "$snapshots"); do snapshot_is_consistent "$number"; done
    rm -r "$DAX/live.pcow" "$DAX/disk"
}

# write_records DISK: one period of the third writer's records.
write_records() {
    dd if=/dev/zero of="$1" bs=1M count=4 2>/dev/null
    pcow-guest-io store "$1" 0 4M 3
}

# The files of a snapshot's new layer would not be on DAX: a guest's fence would no longer make anything durable.
snapshot_leaves_dax() {
    wait_for_guest '^round 1\.'
    chattr -x "$DAX/flagged/live.pcow"
    if pcow-img snapshot "$DAX/flagged/live.pcow" refused >/tmp/refused 2>&1; then
        fail "a snapshot left DAX" >&2
    fi
    cat /tmp/refused >&2
    grep -q 'files that are made in it now are not' /tmp/refused
    grep -q 'chattr +x' /tmp/refused
    # What the message says to do.
    chattr +x "$DAX/flagged/live.pcow"
    pcow-img snapshot "$DAX/flagged/live.pcow" taken >&2
}

# snapshot_off_dax_is_refused ext4|xfs
snapshot_off_dax_is_refused() {
    remount "$1" dax=inode
    mkdir "$DAX/flagged"
    chattr +x "$DAX/flagged"
    image=$DAX/flagged/live.pcow
    pcow-img create --allocation-unit 64K "$image" 256M
    said_persistence "$image" DAX
    beside=snapshot_leaves_dax
    guest "$image" rounds 5
    beside=
    pcow-img list "$image" >/tmp/snapshots
    grep taken /tmp/snapshots
    if grep refused /tmp/snapshots; then fail "the snapshot that was refused is there"; fi
    rm -r "$DAX/flagged"
    remount "$1" dax=always
}
