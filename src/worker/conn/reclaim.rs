//! Chooses the connections to close when other connections need their slots or their memory. Connections that have been
//! idle the longest are closed first.
//!
//! No I/O and no clock: the caller passes in the state of each connection.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Idle {
    /// Index in the caller's list.
    pub(crate) index: usize,
    /// Number of ticks for which the connection has been idle.
    pub(crate) ticks: u32,
}

/// Returns the number of connections to close at a time, for a limit of `limit` connections. If they were closed one at
/// a time, all connections would have to be searched for every slot.
pub(crate) fn share(limit: u32) -> usize {
    usize::try_from(limit / 32).unwrap_or(usize::MAX).max(1)
}

/// Returns up to `most` connections that have been idle for the longest time. A connection that was
/// used since the last tick is not chosen: its client may be about to send.
pub(crate) fn choose(mut idle: Vec<Idle>, most: usize) -> Vec<usize> {
    idle.retain(|idle| idle.ticks > 0);
    if idle.len() > most {
        idle.select_nth_unstable_by_key(most, |idle| (u32::MAX - idle.ticks, idle.index));
        idle.truncate(most);
    }
    idle.into_iter().map(|idle| idle.index).collect()
}

/// A connection that holds memory of unfinished requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) index: usize,
    pub(crate) bytes: u32,
    /// Whether the request cannot proceed until the peer sends more data.
    pub(crate) is_waited_for: bool,
    /// Number of ticks for which the request has been waiting.
    pub(crate) ticks: u32,
}

/// A connection whose request is being served is cut off only if it holds more bytes than this, because a body is not
/// being read or there are many requests.
const MUCH: u32 = 256 << 10;

/// Returns the connections to close so that `bytes` are freed. Connections that wait for their peer come first: the
/// slowest first and, among equally slow ones, those that hold the most bytes. They are followed by connections that
/// hold more than [`MUCH`] bytes.
pub(crate) fn heaviest(mut holders: Vec<Holder>, mut bytes: u64) -> Vec<usize> {
    holders.retain(|holder| holder.is_waited_for || holder.bytes > MUCH);
    let key = |holder: &Holder| (!holder.is_waited_for, u32::MAX - holder.ticks, u32::MAX - holder.bytes);
    holders.sort_unstable_by_key(|holder| if holder.is_waited_for { key(holder) } else { (true, 0, key(holder).2) });
    let chosen = holders.into_iter().take_while(|holder| {
        let goes = bytes > 0;
        bytes = bytes.saturating_sub(holder.bytes.into());
        goes
    });
    chosen.map(|holder| holder.index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(ticks: &[u32], most: usize) -> Vec<usize> {
        let idle = ticks.iter().enumerate().map(|(index, &ticks)| Idle { index, ticks }).collect();
        let mut chosen = choose(idle, most);
        chosen.sort_unstable();
        chosen
    }

    #[test]
    fn those_that_were_used_the_longest_time_ago_go_first() {
        assert_eq!(chosen(&[3, 9, 1, 7, 9], 3), [1, 3, 4]);
        assert_eq!(chosen(&[3, 9, 1, 7, 9], 1), [1], "the older of two");
        assert_eq!(chosen(&[3, 0, 1], 9), [0, 2], "what was used just now is left alone");
        assert!(chosen(&[0, 0], 9).is_empty() && chosen(&[], 1).is_empty() && chosen(&[5], 0).is_empty());
        assert_eq!((share(1), share(31), share(4096)), (1, 1, 128));
    }

    #[test]
    fn those_that_send_slowly_make_room_before_those_that_are_served() {
        let waited_for = |bytes, ticks| (bytes, true, ticks);
        let served = |bytes| (bytes, false, 9);
        let chosen = |holders: &[(u32, bool, u32)], bytes| {
            let holders = holders.iter().enumerate();
            let holder = |(index, &(bytes, is_waited_for, ticks))| Holder { index, bytes, is_waited_for, ticks };
            heaviest(holders.map(holder).collect(), bytes)
        };
        let all =
            [waited_for(10, 0), served(300 << 10), waited_for(5, 3), served(9), waited_for(20, 0), served(MUCH + 1)];
        assert_eq!(chosen(&all, 0), [0; 0]);
        assert_eq!(chosen(&all, 1), [2], "the slowest");
        assert_eq!(chosen(&all, 6), [2, 4], "and the one that holds most");
        assert_eq!(chosen(&all, 36), [2, 4, 0, 1]);
        assert_eq!(chosen(&all, u64::MAX), [2, 4, 0, 1, 5], "who holds little is served");
    }

    #[test]
    fn in_any_list_nobody_is_chosen_before_one_that_was_idle_for_longer() {
        for seed in 0..500 {
            let mut random = fastrand::Rng::with_seed(seed);
            let ticks: Vec<u32> = (0..random.usize(..40)).map(|_| random.u32(..8)).collect();
            let most = random.usize(..40);
            let chosen = chosen(&ticks, most);
            let could = ticks.iter().filter(|&&ticks| ticks > 0).count();
            assert_eq!(chosen.len(), could.min(most), "seed {seed}");
            let shortest = chosen.iter().map(|&index| ticks[index]).min().unwrap_or(u32::MAX);
            let left = (0..ticks.len()).filter(|index| !chosen.contains(index)).map(|index| ticks[index]);
            assert!(left.max().unwrap_or(0) <= shortest, "seed {seed}");
        }
    }
}
