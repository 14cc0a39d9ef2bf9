use super::sync::{AtomicU64, Ordering};
use super::units::{
    Door, MAX_GATEWAYS, MAX_WAITING, Taken, age_us, busy, close, drain, epoch, free, free_from_dead, is_free,
    longest_waiting, open, owner, set_waiting, state, take, waiting,
};

const NOW: u64 = 5_000_000;

struct Process {
    door: AtomicU64,
    units: [AtomicU64; 2],
}

impl Process {
    fn opened() -> Process {
        let process = Process { door: AtomicU64::new(0), units: Default::default() };
        assert_eq!(open(&process.door, &process.units, usize::MAX, NOW), 1);
        process
    }

    fn take(&self, unit: usize, gateway: u32) -> Taken {
        let (door, word) = (load(&self.door), load(&self.units[unit]));
        if !is_free(door, word) {
            return Taken::Lost;
        }
        take((&self.door, door), (&self.units[unit], word), gateway, NOW)
    }
}

fn load(word: &AtomicU64) -> u64 {
    word.load(Ordering::SeqCst)
}

fn mine(taken: Taken) -> u64 {
    match taken {
        Taken::Mine(word) => word,
        other => panic!("not taken: {other:?}"),
    }
}

#[test]
fn a_unit_has_one_owner() {
    let process = Process::opened();
    for gateway in [0, 1, MAX_GATEWAYS - 1] {
        let word = mine(process.take(0, gateway));
        assert_eq!(owner(word), Some(gateway));
        assert_eq!((process.take(0, gateway), busy(&process.units)), (Taken::Lost, 1));
        assert!(!free_from_dead(&process.units[0], gateway + 1, NOW), "another gateway holds it");
        assert!(free(&process.units[0], word, NOW) && !free(&process.units[0], word, NOW));
    }
    mine(process.take(0, 3));
    assert!(free_from_dead(&process.units[0], 3, NOW) && !free_from_dead(&process.units[0], 3, NOW));
    assert_eq!(busy(&process.units), 0);
}

#[test]
fn only_an_open_door_admits_a_claim() {
    let process = Process::opened();
    let before = load(&process.door);
    let word = load(&process.units[0]);
    let held = mine(process.take(1, 0));
    drain(&process.door);
    assert_eq!((state(load(&process.door)), epoch(load(&process.door))), (Door::Draining, 1));
    assert_eq!(process.take(0, 0), Taken::Lost);
    // The gateway read the door before the drain.
    let late = || take((&process.door, before), (&process.units[0], word), 0, NOW);
    assert_eq!((late(), busy(&process.units)), (Taken::GivenBack, 1));
    close(&process.door);
    drain(&process.door);
    assert_eq!(
        (state(load(&process.door)), epoch(load(&process.door))),
        (Door::Closed, 1),
        "a closed door stays closed"
    );
    assert_eq!(late(), Taken::GivenBack);
    assert!(free(&process.units[1], held, NOW), "a unit of a dead app process can be released");
}

#[test]
fn a_late_claim_or_release_does_not_affect_the_successor() {
    let process = Process::opened();
    let (door, word) = (load(&process.door), load(&process.units[0]));
    let held = mine(process.take(1, 0));
    close(&process.door);
    assert_eq!(busy(&process.units), 1, "the unit keeps its owner");
    assert_eq!(open(&process.door, &process.units, usize::MAX, NOW), 2);
    assert_eq!(busy(&process.units), 0);
    assert_eq!(take((&process.door, door), (&process.units[0], word), 0, NOW), Taken::Lost);
    // The same gateway claims the unit at the same time as before.
    let again = mine(process.take(1, 0));
    assert!(!free(&process.units[1], held, NOW) && free(&process.units[1], again, NOW));
}

#[test]
fn the_tag_wraps_with_the_epoch() {
    let process = Process::opened();
    for epoch in 2..10_000 {
        close(&process.door);
        assert_eq!(open(&process.door, &process.units, usize::MAX, NOW), epoch);
        let word = mine(process.take(0, 7));
        assert!(free(&process.units[0], word, NOW));
    }
    process.door.store(u64::from(u32::MAX) << 32, Ordering::SeqCst);
    assert_eq!(open(&process.door, &process.units, usize::MAX, NOW), 0);
    mine(process.take(0, 7));
}

#[test]
fn ages_survive_the_wrap_of_their_40_bits() {
    let row = AtomicU64::new(0);
    for now in [NOW, (1 << 40) - 5, 1 << 40, (7 << 40) + 3, u64::MAX] {
        for age in [0, 1, 999_999, 60_000_000, 12 * 24 * 3_600_000_000] {
            set_waiting(&row, 1, now.wrapping_sub(age));
            assert_eq!(age_us(load(&row), now), age, "{age} before {now}");
        }
        set_waiting(&row, 1, now.wrapping_add(900_000));
        assert_eq!(age_us(load(&row), now), 0, "a process with a slightly later time stored it");
    }
}

#[test]
fn the_gateway_that_waits_longest_is_found() {
    let rows: [AtomicU64; 4] = Default::default();
    let longest = || longest_waiting((0..).zip(&rows), NOW);
    assert_eq!(longest(), None);
    assert!(!set_waiting(&rows[3], 5, NOW - 10) && !set_waiting(&rows[1], 1, NOW - 20));
    assert!(!set_waiting(&rows[2], u32::MAX, NOW + 50));
    assert_eq!((longest(), waiting(load(&rows[3])), waiting(load(&rows[2]))), (Some(1), 5, MAX_WAITING));
    assert!(!set_waiting(&rows[3], 4, NOW - 30));
    assert_eq!(longest(), Some(3));
    assert!(set_waiting(&rows[3], 0, NOW) && !set_waiting(&rows[3], 0, NOW), "it stops waiting once");
    assert!(set_waiting(&rows[1], 0, NOW) && set_waiting(&rows[2], 0, NOW));
    assert_eq!(longest(), None);
}

#[test]
fn any_word_can_be_decoded() {
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..100_000 {
        let (door, word) = (AtomicU64::new(random.u64(..)), AtomicU64::new(random.u64(..)));
        let (door_before, before) = (load(&door), load(&word));
        assert!(owner(before).is_none_or(|gateway| gateway < MAX_GATEWAYS), "seed {seed}");
        assert!(age_us(before, random.u64(..)) < 1 << 40, "seed {seed}");
        let gateway = random.u32(0..MAX_GATEWAYS);
        if is_free(door_before, before) {
            mine(take((&door, door_before), (&word, before), gateway, NOW));
        }
        free_from_dead(&word, gateway, NOW);
        let units = [word];
        open(&door, &units, usize::MAX, NOW);
        assert!(busy(&units) == 0 && is_free(load(&door), load(&units[0])), "seed {seed}");
    }
}
