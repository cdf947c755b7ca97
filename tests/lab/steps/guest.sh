# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# A guest under KVM, in the patched QEMU, on images that backends serve.

# What the longest guest takes (steps/killing.sh), and half as much again. STEP_SECONDS of host.sh is longer.
GUEST_SECONDS=900

# What is run as a backend, and what it has to say of the image's persistence.
backend_program=pcow-backend
persistence='DAX: what the guest flushes is durable'

# The device that a guest has for each image, and more options of its memory, with a comma before each.
memory_device=nvdimm
memory_options=

# start_backend N IMAGE: the backend number N, with its socket and its log in /tmp.
start_backend() {
    socket=/tmp/backend$1.sock
    rm -f "$socket"
    "$backend_program" --socket "$socket" --image "$2" 2>"/tmp/backend$1.log" &
    backends="$backends $!"
    for _ in $(seq 300); do
        if [ -S "$socket" ]; then return 0; fi
        kill -0 $! || break
        usleep 100000
    done
    cat "/tmp/backend$1.log"
    fail "the backend does not listen"
}

# Ends all backends. What the guest flushed has to be durable, and the guest's end to be clean.
end_backends() {
    number=0
    for backend in $backends; do
        kill -TERM "$backend"
        status=0
        wait "$backend" || status=$?
        cat "/tmp/backend$number.log"
        [ "$status" = 0 ] || fail "the backend ended with $status"
        grep -q "$persistence" "/tmp/backend$number.log"
        number=$((number + 1))
    done
}

# write_initramfs SCRIPT [WORD]...: what the guest boots: it runs a script of the folder guest with the words, and
# powers off.
write_initramfs() {
    script=$1
    shift
    mkdir /tmp/guest
    { echo "set -- $*" && cat /lab/guest/begin.sh "/lab/guest/$script.sh"; } >/tmp/guest/script
    cp /lab/machine/initramfs /tmp/initramfs
    (cd /tmp/guest && echo script | cpio -o -H newc --quiet) >>/tmp/initramfs
    rm -r /tmp/guest
}

# A function that runs beside the guest, with what it writes as the guest's input.
beside=

start_beside() {
    input=/dev/null
    : >/tmp/guest.log
    if [ -n "$beside" ]; then
        input=/tmp/input
        rm -f "$input"
        mkfifo "$input"
        "$beside" >"$input" &
        beside_process=$!
    fi
}

# Sets $failure if what ran beside the guest has failed.
end_beside() {
    failure=
    if [ -n "$beside" ]; then
        # A guest that did not come to its end, as one that was reset, may have left it waiting.
        if ! grep -q '^PCOW-GUEST-EXIT' /tmp/guest.log; then kill "$beside_process" || true; fi
        wait "$beside_process" || failure="what ran beside the guest failed"
    fi
}

# wait_for_guest TEXT: until the guest has said it.
wait_for_guest() {
    until grep -q "$1" /tmp/guest.log; do
        pidof qemu-system-x86_64 >/dev/null || fail "the guest ended before it said $1" >&2
        usleep 100000
    done
}

# boot_machine [ARGUMENT]...: a machine with what the arguments say. Its serial line is on its standard streams.
boot_machine() {
    timeout -s KILL "$GUEST_SECONDS" qemu-system-x86_64 \
        -machine q35,nvdimm=on,accel=kvm -cpu host -smp 2 -m 512M,slots=4,maxmem=16G \
        -nodefaults -display none -no-reboot -serial stdio \
        -kernel /lab/machine/vmlinux -initrd /tmp/initramfs \
        -append "console=ttyS0 quiet panic=-1 cryptomgr.notests" \
        "$@"
}

# run_qemu IMAGES [ARGUMENT]...: a machine with a device for each of the images, and what else the
# arguments say. Its serial line and its messages go to /tmp/guest.log.
run_qemu() {
    images=$1
    shift
    backends=
    number=0
    for image in $images; do
        start_backend "$number" "$image"
        set -- "$@" -chardev "socket,id=c$number,path=/tmp/backend$number.sock" \
            -object "memory-backend-pcow,id=pm$number,chardev=c$number$memory_options" \
            -device "$memory_device,memdev=pm$number"
        number=$((number + 1))
    done
    start_beside
    status=0
    boot_machine "$@" <"$input" >>/tmp/guest.log 2>&1 || status=$?
    if [ "$status" != 0 ]; then echo "QEMU ended with $status" >>/tmp/guest.log; fi
    end_beside
    rm /tmp/initramfs
    sed 's/^/guest: /' /tmp/guest.log
    end_backends
}

# guest IMAGES SCRIPT [WORD]...: boots a guest, whose script has to succeed. $machine has more arguments
# for QEMU; the last one of a kind counts.
machine=
guest() {
    images=$1
    shift
    write_initramfs "$@"
    # shellcheck disable=SC2086 # one argument per word
    run_qemu "$images" $machine
    if [ -n "$failure" ]; then fail "$failure"; fi
    if grep 'QEMU ended with' /tmp/guest.log; then exit 1; fi
    tr -d '\r' </tmp/guest.log | grep -q '^PCOW-GUEST-EXIT 0$' || fail "the guest failed"
}

# told KEY: what follows "KEY: " on the line of the guest's console that begins so.
told() {
    tr -d '\r' </tmp/guest.log | sed -n "s|^$1: ||p"
}

# logged TEXT LOG: the number before TEXT in a backend's log of one session.
logged() {
    sed -n "s/.*[^0-9]\([0-9][0-9]*\) $1.*/\1/p" "$2" | grep .
}

# KiB that an image takes on disk.
taken() {
    sync
    du -s -k "$1" | cut -f1
}
