# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Whether QEMU maps an image with huge pages, as the kernel's trace events tell, and KVM in its second-level tables, as its
# statistics tell.

STATISTICS=/sys/kernel/debug/kvm
TRACE=/sys/kernel/tracing/instances/huge

# Notes the most entries of 2 MiB that a guest has had, until the guest is over, or the step.
watch_huge_pages() {
    most=0
    while [ ! -e /tmp/guest.over ] && kill -0 $$ 2>/dev/null; do
        now=$(cat "$STATISTICS"/*-*/pages_2m 2>/dev/null | sort -n | tail -n 1)
        if [ "${now:-0}" -gt "$most" ]; then most=$now; fi
        echo "$most" >/tmp/huge
        usleep 100000
    done
}

# Counts the faults of a file that got a huge page. Nobody but QEMU and KVM, in QEMU's memory, maps an image's data.
count_huge_faults() {
    inode=$(printf '0x%x' "$(stat -c %i "$1")")
    grep "dax_pmd_fault_done: .* ino $inode " "$TRACE/trace" | grep -v -c FALLBACK || true
}

# huge_pages_of_guest [OPTION]...: of a guest that makes a filesystem and writes files on a new image with these options.
huge_pages_of_guest() {
    rm -f /tmp/guest.over
    watch_huge_pages &
    watcher=$!
    pcow-img create "$@" "$DAX/huge.pcow" 256M
    echo >"$TRACE/trace"
    guest "$DAX/huge.pcow" write one
    touch /tmp/guest.over
    wait "$watcher"
    huge_faults=$(count_huge_faults "$DAX"/huge.pcow/*.data)
    rm -r "$DAX/huge.pcow"
    echo "huge pages: $(cat /tmp/huge) of KVM; $huge_faults faults of the data got one"
}

guest_has_huge_pages() {
    grep -q "$STATISTICS\|/sys/kernel/debug " /proc/mounts || mount -t debugfs debugfs /sys/kernel/debug
    mkdir -p "$TRACE"
    echo 1 >"$TRACE/events/fs_dax/dax_pmd_fault_done/enable"
    # Those of the guest's other memory must not count. It makes no difference to DAX.
    echo never >/sys/kernel/mm/transparent_hugepage/enabled
    huge_pages_of_guest
    [ "$(cat /tmp/huge)" -gt 0 ] || fail "the guest had no huge pages"
    [ "$huge_faults" -gt 0 ] || fail "QEMU had no huge pages"
    # The control: what is mapped in small units has none, so that the numbers speak of the image.
    huge_pages_of_guest --allocation-unit 64K
    [ "$(cat /tmp/huge)" = 0 ] || fail "there are huge pages that the image cannot have"
    [ "$huge_faults" = 0 ] || fail "there are huge faults that the image cannot have"
    rmdir "$TRACE"
}
