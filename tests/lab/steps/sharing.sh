# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Others than vCPUs that touch a guest's persistent memory: QEMU's disks, the host's network, KSM.

FILES=$DAX/files.pcow

# Makes an image whose guest wrote the files a, b and c of 8 MiB, unless an earlier step did. Their sums
# are those that it told.
need_files() {
    if [ ! -d "$FILES" ]; then
        pcow-img create --allocation-unit 64K "$FILES" 128M
        guest "$FILES" files
        told sum >/tmp/files.sums
    fi
}

# Disks that are read into memory which the guest's other vCPU loads meanwhile, with each of QEMU's ways
# to read. The guest must see no I/O error, and the disks' bytes in the end.
disks_read_into_dax_memory() {
    need_files
    machine=
    for disk in a b c; do
        dd if=/dev/urandom of="$DAX/disk-$disk" bs=1M count=8 2>/dev/null
        case $disk in
        a) options=aio=threads ;;
        b) options=aio=native,cache=none ;;
        c) options=aio=io_uring,cache=none ;;
        esac
        machine="$machine -drive if=virtio,format=raw,$options,file=$DAX/disk-$disk"
        md5sum <"$DAX/disk-$disk"
    done >/tmp/disks
    pcow-img create --allocation-unit 64K --base "$FILES" "$DAX/reader.pcow"
    guest "$DAX/reader.pcow" disks
    told sum >/tmp/told
    cmp /tmp/told /tmp/disks
    machine=
    guest "$DAX/reader.pcow" sums
    told sum >/tmp/told
    cmp /tmp/told /tmp/disks
    pcow-img check "$DAX/reader.pcow"
    rm -r "$DAX/reader.pcow" "$DAX"/disk-?
}

receive_and_send() {
    nc -l -p 5000 >/tmp/received
    exec nc -l -p 5001 <"$DAX/sent"
}

# The host's network driver (vhost_net) reads what a guest sends where it stands: in memory that nobody has touched
# before. What the guest receives it stores itself, into such memory.
network_uses_dax_memory() {
    need_files
    # One of an attempt before this would be in the way.
    if [ -e /sys/class/net/tap0 ]; then tunctl -d tap0; fi
    tunctl -t tap0
    ip addr add 10.0.0.1/24 dev tap0
    ip link set tap0 up
    dd if=/dev/urandom of="$DAX/sent" bs=1M count=8 2>/dev/null
    pcow-img create --allocation-unit 64K --base "$FILES" "$DAX/sender.pcow"
    beside=receive_and_send
    machine="-netdev tap,id=n0,ifname=tap0,script=no,downscript=no,vhost=on,vhostforce=on"
    machine="$machine -device virtio-net-pci,netdev=n0,romfile="
    guest "$DAX/sender.pcow" network 10.0.0.1:5000 10.0.0.1:5001
    beside=
    machine=
    md5sum </tmp/received >/tmp/told
    head -n 1 /tmp/files.sums >/tmp/expected
    cmp /tmp/told /tmp/expected
    md5sum <"$DAX/sent" >/tmp/expected
    told sum >/tmp/told
    cmp /tmp/told /tmp/expected
    guest "$DAX/sender.pcow" sums
    told sum | sed -n 2p >/tmp/told
    cmp /tmp/told /tmp/expected
    ip link set tap0 down
    tunctl -d tap0
    rm -r "$DAX/sender.pcow" "$DAX/sent"
}

# runs_repeated ,bounce=on|,bounce=off: of four processors that store into pages of a base that others load; in $repeated, how
# often a store has met a moment and KVM_RUN was entered once more. Without asynchronous page faults in the guest a vCPU only
# waits for KVM's worker, so that it is back while the moment lasts.
runs_repeated() {
    pcow-img create --allocation-unit 64K --base "$FILES" "$DAX/mixed.pcow"
    memory_options=$1
    machine="-smp 4 -cpu host,kvm-asyncpf=off,kvm-asyncpf-int=off -trace kvm_run_repeated -D /tmp/trace"
    : >/tmp/trace
    guest "$DAX/mixed.pcow" mixed store
    repeated=$(grep -c kvm_run_repeated /tmp/trace || true)
    bounced=$(logged bounced /tmp/backend0.log)
    machine=
    guest "$DAX/mixed.pcow" mixed verify
    memory_options=
    echo "with $1: $bounced bounces, $repeated runs of vCPUs were repeated"
    pcow-img check "$DAX/mixed.pcow"
    rm -r "$DAX/mixed.pcow"
}

processors_store_and_load_at_once() {
    need_files
    pcow-img create --base "$FILES" "$DAX/sealer.pcow"
    rm -r "$DAX/sealer.pcow"
    md5sum "$FILES"/*.data >/tmp/base.sums
    runs_repeated ,bounce=on
    [ "$bounced" -gt 0 ] || fail "there were no bounces"
    [ "$repeated" -gt 0 ] || fail "no store has met a moment"
    runs_repeated ,bounce=off
    [ "$bounced" = 0 ] || fail "there were bounces"
    [ "$repeated" = 0 ] || fail "there was nothing to be repeated for"
    md5sum -c /tmp/base.sums
}

# tell_monitor COMMAND
tell_monitor() {
    echo "$1" >&5
}

# has_said PATTERN: whether the monitor has.
has_said() {
    grep -q "$1" /tmp/monitor.out
}

# Dumps the guest's memory, and takes half of it by the balloon.
dump_and_balloon() {
    wait_for_guest '^stored'
    rm -f /tmp/monitor.in
    mkfifo /tmp/monitor.in
    nc 127.0.0.1 4444 </tmp/monitor.in >/tmp/monitor.out &
    exec 5>/tmp/monitor.in
    tell_monitor 'balloon 256'
    until has_said 'actual=256'; do
        tell_monitor 'info balloon'
        usleep 200000
    done
    tell_monitor "dump-guest-memory $DAX/dump"
    # In other digits than the command, which the monitor repeats.
    tell_monitor 'print /x 3054'
    until has_said 0xbee; do usleep 100000; done
    exec 5>&-
    echo go
}

# The image is none of the guest's memory for who dumps it or takes it away.
whole_memory_is_dumped_and_ballooned() {
    pcow-img create --allocation-unit 64K "$DAX/whole.pcow" 256M
    empty=$(taken "$DAX/whole.pcow")
    beside=dump_and_balloon
    machine="-device virtio-balloon-pci -monitor tcp:127.0.0.1:4444,server=on,wait=off"
    guest "$DAX/whole.pcow" whole store
    beside=
    machine=
    dumped=$(($(stat -c %s "$DAX/dump") >> 20))
    rm "$DAX/dump"
    echo "the dump has $dumped MiB, of a guest of 512 MiB and an image of 256 MiB"
    [ "$dumped" -ge 512 ] && [ "$dumped" -lt 576 ] || fail "this is not the guest's memory without the image"
    assert_grown_little "$DAX/whole.pcow" "$empty"
    guest "$DAX/whole.pcow" whole verify
    pcow-img check "$DAX/whole.pcow"
    rm -r "$DAX/whole.pcow"
}

ksm() {
    cat "/sys/kernel/mm/ksm/$1"
}

# Lets the guest go on when everything was scanned for merging several times, and something was merged.
merge() {
    wait_for_guest loaded
    goal=$(($(ksm full_scans) + 3))
    until [ "$(ksm full_scans)" -ge "$goal" ] && [ "$(ksm pages_sharing)" -gt 0 ]; do
        pidof qemu-system-x86_64 >/dev/null || fail "the guest ended" >&2
        usleep 100000
    done
    echo "$(ksm full_scans) scans, $(ksm pages_sharing) pages shared" >&2
    echo go
}

# Merging equal pages would take the write protection from read copies, and stores into them would be
# lost (the region is never mergeable).
no_store_is_lost_to_merging() {
    tr '\0' x </dev/zero | dd of="$DAX/same.raw" bs=64k count=256 iflag=fullblock 2>/dev/null
    pcow-img create --base "$DAX/same.raw" --base-format raw "$DAX/merged.pcow"
    echo 10000 >/sys/kernel/mm/ksm/pages_to_scan
    echo 10 >/sys/kernel/mm/ksm/sleep_millisecs
    echo 1 >/sys/kernel/mm/ksm/run
    beside=merge
    guest "$DAX/merged.pcow" overwrite
    stored=$(told sum)
    echo 2 >/sys/kernel/mm/ksm/run
    beside=
    guest "$DAX/merged.pcow" read
    [ "$(told sum)" = "$stored" ] || fail "stores were lost"
    rm -r "$DAX/merged.pcow" "$DAX/same.raw"
}

# try_qemu [ARGUMENT]...: a machine that does not run, with an image that a backend serves as the chardev c0, and
# its monitor on its standard streams. What it says goes to /tmp/said.
try_qemu() {
    backends=
    start_backend 0 "$DAX/pinned.pcow"
    timeout -s KILL "$GUEST_SECONDS" qemu-system-x86_64 \
        -machine q35,nvdimm=on,accel=kvm -cpu host -m 128M,slots=2,maxmem=2G -S \
        -nodefaults -display none -qmp stdio \
        -chardev "socket,id=c0,path=/tmp/backend0.sock" "$@" >/tmp/said 2>&1 || echo "QEMU ended with $?" >>/tmp/said
    cat /tmp/said
    end_backends
}

# A device that pins all of a guest's memory for its own access would allocate the whole image, and keep
# what a mapping replaced.
pinning_devices_are_refused() {
    pcow-img create "$DAX/pinned.pcow" 64M
    give_device_to_vfio
    memory="memory-backend-pcow,id=pm,chardev=c0"
    device="vfio-pci,host=$pinning,id=pinning"
    # Without the image the device is taken.
    printf '%s\n' '{"execute": "qmp_capabilities"}' '{"execute": "quit"}' |
        try_qemu -device "$device"
    if grep 'QEMU ended with' /tmp/said; then fail "the device is not taken"; fi
    try_qemu -object "$memory" -device "$device" </dev/null
    grep 'vfio .*: Cannot set discarding of RAM broken' /tmp/said
    grep 'QEMU ended with 1' /tmp/said
    printf '%s\n' '{"execute": "qmp_capabilities"}' \
        '{"execute": "object-add", "arguments": {"qom-type": "memory-backend-pcow", "id": "pm", "chardev": "c0"}}' \
        '{"execute": "quit"}' |
        try_qemu -device "$device"
    grep 'memory-backend-pcow .*: there are devices that pin guest memory' /tmp/said
    rm -r "$DAX/pinned.pcow"
}

# Binds the lab host's only device that no driver needs, QEMU's for tests of PCI, and sets $pinning to its address.
give_device_to_vfio() {
    for device in /sys/bus/pci/devices/*; do
        if [ "$(cat "$device/vendor" "$device/device" | tr '\n' ' ')" = '0x1b36 0x0005 ' ]; then
            pinning=$(basename "$device")
        fi
    done
    echo vfio-pci >"/sys/bus/pci/devices/$pinning/driver_override"
    echo "$pinning" >/sys/bus/pci/drivers_probe
    test -e "/sys/bus/pci/drivers/vfio-pci/$pinning"
}
