# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# What the lab host does: the steps of the form in LAB_FORM, on each filesystem. Run by busybox sh.
#
# A step is a function of the folder steps. It runs in a shell of its own with `set -eu`, so any command
# that fails ends it. Each is reported on the second serial line; what it says goes to the console.
# LAB_STEPS, names with commas between them, chooses among the steps; "clone" is that of each filesystem.
# Preparations are steps that are never left out.

REPORTS=/dev/ttyS1
# Longer than GUEST_SECONDS of steps/guest.sh, shorter than PATIENCE of xtask: whoever is nearest to what hangs says so.
STEP_SECONDS=1200
passed=0
failed=0
chosen=0

report() {
    echo "$1"
    echo "$1" >"$REPORTS"
}

# prepare NAME FUNCTION [ARGUMENT]...
prepare() {
    name=$1
    shift
    echo "== $name"
    status=0
    timeout -s KILL "$STEP_SECONDS" sh -eu /lab/steps.sh "$@" </dev/null 2>&1 || status=$?
    if [ "$status" = 0 ]; then
        passed=$((passed + 1))
        report "LAB-STEP $name ok"
        return 0
    fi
    echo "status $status; the last messages of the kernel:"
    dmesg | tail -n 20
    # What the step has left running would disturb the next one.
    killall -q -KILL qemu-system-x86_64 pcow-backend
    failed=$((failed + 1))
    report "LAB-STEP $name FAILED"
    return 1
}

# step NAME FUNCTION [ARGUMENT]...
step() {
    is_chosen "$1" || return 0
    chosen=$((chosen + 1))
    prepare "$@"
}

is_chosen() {
    [ -n "${LAB_STEPS:-}" ] || return 0
    for wanted in $(echo "$LAB_STEPS" | tr , ' '); do
        case $1 in "$wanted" | */"$wanted") return 0 ;; esac
    done
    return 1
}

on_filesystem() {
    fs=$1
    prepare "$fs/mount" mount_dax "$fs" || return
    if [ "$LAB_FORM" = bench ]; then
        step "$fs/bench" bench
    else
        tests_on_filesystem
    fi
    prepare "$fs/unmount" unmount_dax
}

tests_on_filesystem() {
    step "$fs/info" image_is_dax
    step "$fs/dax" rust_test pcow-tests.dax
    # The short form has of XFS what depends most on the filesystem.
    if [ "$LAB_FORM" = short ] && [ "$fs" = xfs ]; then return 0; fi
    step "$fs/frontend" rust_test pcow-protocol.frontend
    step "$fs/guest" guest_boots_twice
    step "$fs/clone" guest_changes_a_clone
    step "$fs/reading" guest_reads_without_allocating 64
    if [ "$LAB_FORM" = full ]; then
        step "$fs/killing" guest_outlives_its_backends 100
        step "$fs/rollback" guest_sees_a_rollback
        step "$fs/live" guest_is_snapshotted 5
        step "$fs/live-off-dax" snapshot_off_dax_is_refused "$fs"
        # Minutes, for what does not depend on the filesystem.
        if [ "$fs" = ext4 ]; then
            step "$fs/reading-all" guest_reads_without_allocating 512
            step "$fs/reading-no-bounce" guest_reads_without_bounces 512
            step "$fs/reading-exact" guest_reads_exactly 64
        fi
        step "$fs/clones" guests_change_clones
        step "$fs/disks" disks_read_into_dax_memory
        step "$fs/network" network_uses_dax_memory
        step "$fs/processors" processors_store_and_load_at_once
        step "$fs/whole-memory" whole_memory_is_dumped_and_ballooned
        step "$fs/pinning" pinning_devices_are_refused
        step "$fs/merging" no_store_is_lost_to_merging
        step "$fs/default-unit" guest_writes_with_the_default_unit
        step "$fs/domains" domains "$fs"
        step "$fs/huge-pages" guest_has_huge_pages
        step "$fs/format-parts" rust_test pcow-format.pcow_format
        for part in image check deletion lock stream; do
            step "$fs/format-$part" rust_test "pcow-format.$part"
        done
        step "$fs/environment" rust_test pcow-protocol.environment
        step "$fs/mappings" rust_test pcow-tests.mapping_budget
        # Chains of a thousand layers and the default budgets do not fit into this host's memory.
        step "$fs/touches" rust_test pcow-tests.random_touch on_one_layer on_64_layers
        for part in reading given_back stores read_only; do
            step "$fs/kvm-$part" rust_test pcow-tests.pcow-kvm-faults "$part::"
        done
    else
        step "$fs/kvm-faults" rust_test pcow-tests.pcow-kvm-faults --short
    fi
}

mkdir -p /dax /dev/shm /sys/kernel/debug
mount -t tmpfs shm /dev/shm
mount -t tracefs trace /sys/kernel/tracing
ip link set lo up
stty -F "$REPORTS" raw

# The steps of cargo xtask lab --power-loss, each after a boot of its own.
power_loss() {
    cut=$LAB_FILESYSTEM/$LAB_DEVICE
    if [ "$LAB_FORM" = power-write ]; then
        prepare "$cut/write" write_until_the_power_is_lost "$LAB_FILESYSTEM" "$LAB_DEVICE"
    else
        prepare "$cut/disk" disk_has_lost_its_page_cache "$LAB_FILESYSTEM" &&
            prepare "$cut/image" image_is_sound &&
            prepare "$cut/guest" guest_finds_its_records "$LAB_DEVICE"
    fi
    report "LAB-RESULT $passed $failed"
}

case $LAB_FORM in
power-*)
    power_loss
    exit
    ;;
bench) filesystems=ext4 ;;
short | full) filesystems="ext4 xfs" ;;
shell)
    sh -eu /lab/steps.sh make_namespace
    sh -eu /lab/steps.sh mount_dax ext4
    echo "The persistent memory is mounted on /dax; the steps are functions of the folder /lab/steps."
    setsid cttyhack sh
    exit
    ;;
esac

step host/kvm host_has_kvm
prepare host/namespace make_namespace
step host/uffd rust_test pcow-protocol.uffd
for fs in $filesystems; do
    on_filesystem "$fs"
done
if [ "$chosen" = 0 ]; then
    failed=$((failed + 1))
    report "LAB-STEP any-of:${LAB_STEPS:-none} FAILED"
fi
report "LAB-RESULT $passed $failed"
