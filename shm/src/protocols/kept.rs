//! The protocol for connections that a gateway keeps to an app process after a request.
//!
//! ```text
//! kept     32 bits epoch of the door | 20 bits unused | 12 bits keeper (gateway + 1; 0 = none)
//! ```
//! There is one word for each unit. An app process that serves one connection at a time accepts no other connection while a gateway keeps
//! one, so the keeper must close it when it is in the way of another process:
//!
//! | the other process | what it does | what the keeper does |
//! |---|---|---|
//! | a gateway that claims the unit | takes the unit (`units.rs`), then reads the word ([`keeper`]), and wakes the keeper | when woken: closes the connections whose unit another gateway holds |
//! | the master that drains the app process | changes the door, then reads the words, and wakes the keepers | the same for doors that are not open. After a release, it reads the door, and closes the connection if the door is not open |
//!
//! The keeper stores the word ([`keep`]) before it frees the unit. A gateway that takes the unit afterwards therefore finds the keeper, and so
//! does the master, unless the keeper finds that the door has changed. After it has closed a connection, the keeper removes the word
//! ([`forget`]), and wakes the master if the door is not open.
//!
//! Must not wait, make system calls, or read a clock.

use super::sync::{AtomicU64, Ordering};

const EPOCH_SHIFT: u32 = 32;
const KEEPER_MASK: u64 = 0xfff;

/// Records that a gateway keeps a connection. The gateway must hold the unit, and frees it afterwards. Has no effect if a connection to a
/// later app process is kept: the gateway was stopped, and no longer holds the unit.
pub(crate) fn keep(kept: &AtomicU64, epoch: u32, gateway: u32) {
    let word = word(epoch, gateway);
    let mut seen = kept.load(Ordering::Relaxed);
    while seen != word && !is_later(seen, epoch) {
        match kept.compare_exchange(seen, word, Ordering::SeqCst, Ordering::Relaxed) {
            Ok(_) => return,
            Err(now) => seen = now,
        }
    }
}

/// Whether a word belongs to a later epoch. Epochs wrap around.
fn is_later(kept: u64, epoch: u32) -> bool {
    let of_word = u32::try_from(kept >> EPOCH_SHIFT).unwrap_or(0);
    kept & KEEPER_MASK != 0 && matches!(of_word.wrapping_sub(epoch), 1..0x8000_0000)
}

/// Returns the gateway that keeps a connection to the app process of this epoch.
pub(crate) fn keeper(kept: u64, epoch: u32) -> Option<u32> {
    let keeper = u32::try_from(kept & KEEPER_MASK).ok()?.checked_sub(1)?;
    (kept >> EPOCH_SHIFT == u64::from(epoch)).then_some(keeper)
}

/// Records that a gateway no longer keeps a connection. Has no effect if another gateway keeps one now.
pub(crate) fn forget(kept: &AtomicU64, epoch: u32, gateway: u32) {
    let _ = kept.compare_exchange(word(epoch, gateway), 0, Ordering::SeqCst, Ordering::Relaxed);
}

fn word(epoch: u32, gateway: u32) -> u64 {
    u64::from(epoch) << EPOCH_SHIFT | (u64::from(gateway) + 1) & KEEPER_MASK
}
