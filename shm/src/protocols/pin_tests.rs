//! Tests of `pin.rs`, in a separate file because the model tests compile `pin.rs` against loom's atomics.

use super::pin::*;
use super::sync::AtomicU64;

#[test]
fn a_size_is_rounded_up_by_a_fifth_at_most() {
    for size in
        (0..if cfg!(miri) { 2000 } else { 200_000 }).chain([1 << 20, (1 << 20) + 1, (1 << 30) - 1, (1 << 30) + 4096])
    {
        let rounded = size_of_class(class(size));
        assert!(rounded >= size && (rounded <= size + size / 4 || size < SMALLEST), "{size} becomes {rounded}");
    }
}

#[test]
fn a_cell_says_what_was_pinned_and_holds_one_pin() {
    let cell = AtomicU64::new(0);
    let pin = Pin { shard: 15, main: true, position: GRAIN * ((1 << RING_SHIFT) - 1), size: 320 };
    assert_eq!(get(&cell), None);
    assert!(set(&cell, pin));
    assert_eq!(get(&cell), Some(pin));
    assert!(!set(&cell, pin));
    free(&cell);
    assert_eq!(get(&cell), None);
}
