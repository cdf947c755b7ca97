# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# What the lab host does: the steps of the form in LAB_FORM, on each filesystem. Run by busybox sh.
#
# A step is a function of steps.sh. It runs in a shell of its own with `set -eu`, so any command that
# fails ends it. Each is reported on the second serial line; what it says goes to the console.

REPORTS=/dev/ttyS1
STEP_SECONDS=600
passed=0
failed=0

report() {
    echo "$1"
    echo "$1" >"$REPORTS"
}

# step NAME FUNCTION [ARGUMENT]...
step() {
    name=$1
    shift
    echo "== $name"
    timeout -s KILL "$STEP_SECONDS" sh -eu /lab/steps.sh "$@" </dev/null 2>&1
    status=$?
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

on_filesystem() {
    fs=$1
    step "$fs/mount" mount_dax "$fs" || return
    step "$fs/info" image_is_dax
    step "$fs/frontend" rust_test pcow-protocol.frontend
    step "$fs/guest" guest_boots_twice
    step "$fs/clone" guest_changes_a_clone
    if [ "$LAB_FORM" = full ]; then
        step "$fs/clones" guests_change_two_clones
        step "$fs/format-parts" rust_test pcow-format.pcow_format
        step "$fs/format" rust_test pcow-format.image
        step "$fs/environment" rust_test pcow-protocol.environment
        step "$fs/mappings" rust_test pcow-tests.mapping_budget
        # Chains of a thousand layers and the default budgets do not fit into this host's memory.
        step "$fs/touches" rust_test pcow-tests.random_touch on_one_layer on_64_layers
    fi
    step "$fs/unmount" unmount_dax
}

mkdir -p /dev/shm /sys/kernel/debug
mount -t tmpfs shm /dev/shm
mount -t tracefs trace /sys/kernel/tracing
ip link set lo up
stty -F "$REPORTS" raw

case $LAB_FORM in
short) filesystems=ext4 ;;
full) filesystems="ext4 xfs" ;;
shell)
    sh -eu /lab/steps.sh make_namespace
    sh -eu /lab/steps.sh mount_dax ext4
    echo "The persistent memory is mounted on /dax; the steps are functions of /lab/steps.sh."
    setsid cttyhack sh
    exit
    ;;
esac

step host/kvm host_has_kvm
step host/namespace make_namespace
step host/uffd rust_test pcow-protocol.uffd
for fs in $filesystems; do
    on_filesystem "$fs"
done
report "LAB-RESULT $passed $failed"
