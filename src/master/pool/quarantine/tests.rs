//! Tests the rules of the quarantine one by one, and with random sites, generated from a seed, one of whose routes is
//! fatal.

use super::*;
use crate::config::failures::QuarantineBy;

const SECOND: Duration = Duration::from_secs(1);

fn config() -> QuarantineConfig {
    QuarantineConfig { deaths: 3, window: SECOND * 60, time: SECOND * 60, by: QuarantineBy::Pattern }
}

fn suspect(what: &str) -> RequestKey {
    RequestKey::of(what, QuarantineBy::Pattern)
}

fn suspects(whats: &[&str]) -> Vec<RequestKey> {
    whats.iter().map(|what| suspect(what)).collect()
}

/// Returns a death without information about the crashing thread.
fn silent(in_flight: &[&str], elsewhere: &[&str]) -> Death {
    let (in_flight, elsewhere) = (suspects(in_flight), suspects(elsewhere));
    Death { in_flight, complete: true, culprit: None, running: None, by_itself: true, live_workers: 1, elsewhere }
}

/// Returns a death without last words, in which threads were working on `running` while many other requests waited.
fn at_work_on(running: &[&str], elsewhere: &[&str]) -> Death {
    Death { running: Some(suspects(running)), complete: false, ..silent(&["GET /popular"; 16], elsewhere) }
}

fn of(culprit: &str) -> Death {
    Death { culprit: Some(suspect(culprit)), ..silent(&["GET /popular", culprit], &["GET /popular"]) }
}

fn refused(verdicts: &[Verdict]) -> Vec<&str> {
    verdicts
        .iter()
        .filter_map(|verdict| match verdict {
            Verdict::Refused { key, .. } => Some(key.as_str()),
            Verdict::Released { .. } => None,
        })
        .collect()
}

/// Returns the verdicts on these deaths, which are a second apart.
fn verdicts(deaths: &[Death]) -> Vec<Verdict> {
    let mut quarantine = Quarantine::new(config());
    deaths.iter().zip(1..).flat_map(|(death, second)| quarantine.died(death.clone(), SECOND * second)).collect()
}

#[test]
fn no_innocent_is_refused_in_any_history() {
    let mut found = 0;
    for seed in 0..2000 {
        let mut random = fastrand::Rng::with_seed(seed);
        let workers = random.usize(1..6);
        let routes = random.usize(2..8);
        let popularity: Vec<f64> = (0..routes).map(|_| random.f64()).collect();
        let poison = format!("GET /poison/{}", random.u32(..));
        let mut quarantine = Quarantine::new(config());
        let mut now = Uptime::ZERO;
        for _ in 0..20 {
            now += Duration::from_millis(random.u64(0..15_000));
            let busy = |random: &mut fastrand::Rng| -> Vec<RequestKey> {
                let routes = popularity.iter().enumerate().filter(|(_, popular)| random.f64() < **popular);
                routes.map(|(route, _)| suspect(&format!("GET /route-{route}?q"))).collect()
            };
            let mut in_flight = busy(&mut random);
            in_flight.push(suspect(&poison));
            let elsewhere: Vec<Vec<RequestKey>> = (1..workers).map(|_| busy(&mut random)).collect();
            let culprit = random.bool().then(|| suspect(&poison));
            let live_workers = elsewhere.len();
            let mut running = vec![suspect(&poison)];
            running.extend(in_flight.iter().filter(|_| random.f64() < 0.2).cloned());
            let running = random.bool().then_some(running);
            let (complete, by_itself, elsewhere) = (random.bool(), random.bool(), elsewhere.concat());
            let death = Death { in_flight, complete, culprit, running, by_itself, live_workers, elsewhere };
            let verdicts = [quarantine.died(death, now), quarantine.tick(now)].concat();
            assert!(refused(&verdicts).iter().all(|key| key.starts_with("GET /poison/")), "seed {seed}: {verdicts:?}");
            found += refused(&verdicts).len();
            assert!(quarantine.next_deadline().is_none_or(|deadline| deadline > now), "seed {seed}");
        }
    }
    assert!(found > 2000, "the poison is found: {found}");
}

#[test]
fn the_request_of_the_crashing_thread_is_refused_after_three_deaths() {
    assert_eq!(verdicts(&[of("GET /bad?1"), of("GET /bad?2")]), []);
    let verdicts = verdicts(&[of("GET /bad?1"), of("GET /other"), of("GET /bad?2"), of("GET /bad")]);
    assert_eq!(verdicts, [Verdict::Refused { key: "GET /bad".to_owned(), time: SECOND * 60, times: 1 }]);
}

#[test]
fn a_path_is_refused_before_its_pattern() {
    assert_eq!(refused(&verdicts(&[of("GET /page/7"), of("GET /page/7"), of("GET /page/7")])), ["GET /page/7"]);
    assert_eq!(refused(&verdicts(&[of("GET /page/7"), of("GET /page/7"), of("GET /page/8")])), ["GET /page/*"]);
    let five = [of("GET /page/7"), of("GET /page/7"), of("GET /page/7"), of("GET /page/8"), of("GET /page/8")];
    assert_eq!(refused(&verdicts(&five)), ["GET /page/7"], "deaths that led to a refusal are not evidence again");
}

#[test]
fn of_several_in_flight_only_one_that_no_other_worker_serves_is_guilty() {
    let both = silent(&["GET /popular", "GET /bad"], &["GET /popular"]);
    assert_eq!(refused(&verdicts(&[both.clone(), both.clone(), both])), ["GET /bad"]);
    let quiet = silent(&["GET /popular", "GET /bad"], &[]);
    assert_eq!(verdicts(&[quiet.clone(), quiet.clone(), quiet]), [], "it could be either");
    let different = ["GET /a", "GET /b", "GET /c"].map(|bad| silent(&["GET /popular", bad], &["GET /popular"]));
    assert_eq!(verdicts(&different), []);
    let unwitnessed =
        ["GET /a", "GET /b", "GET /c"].map(|bad| Death { live_workers: 0, ..silent(&["GET /popular", bad], &[]) });
    assert_eq!(verdicts(&unwitnessed), [], "with one worker, no other worker can show that it is innocent");
    let alone = Death { live_workers: 0, ..silent(&["GET /bad"], &[]) };
    assert_eq!(refused(&verdicts(&[alone.clone(), alone.clone(), alone.clone()])), ["GET /bad"]);
    let unnamed = Death { complete: false, ..alone };
    assert_eq!(verdicts(&[unnamed.clone(), unnamed.clone(), unnamed]), []);
    let idle = silent(&[], &[]);
    assert_eq!(verdicts(&[idle.clone(), idle.clone(), idle]), []);
}

#[test]
fn what_threads_were_at_work_on_is_evidence_however_much_was_in_flight() {
    let exited = at_work_on(&["GET /bad"], &[]);
    assert_eq!(refused(&verdicts(&[exited.clone(), exited.clone(), exited.clone()])), ["GET /bad"]);
    let alone = Death { live_workers: 0, ..exited };
    assert_eq!(refused(&verdicts(&[alone.clone(), alone.clone(), alone.clone()])), ["GET /bad"]);

    // Killed because memory ran out: a request that was running is to blame only if no surviving worker serves it.
    let killed = Death { by_itself: false, ..alone };
    assert_eq!(
        verdicts(&[killed.clone(), killed.clone(), killed.clone()]),
        [],
        "no other worker can show that it is innocent"
    );
    let witnessed = Death { live_workers: 1, elsewhere: suspects(&["GET /popular"]), ..killed };
    assert_eq!(refused(&verdicts(&[witnessed.clone(), witnessed.clone(), witnessed.clone()])), ["GET /bad"]);
    let popular = Death { running: Some(suspects(&["GET /popular"])), ..witnessed };
    assert_eq!(verdicts(&[popular.clone(), popular.clone(), popular]), []);
}

#[test]
fn deaths_count_within_the_window_only() {
    let mut quarantine = Quarantine::new(config());
    for minute in 0..10 {
        assert_eq!(quarantine.died(of("GET /bad"), SECOND * 31 * minute), []);
    }
    let mut off = Quarantine::new(QuarantineConfig { deaths: 0, ..config() });
    assert!((0..10).all(|_| off.died(of("GET /bad"), SECOND).is_empty()));
}

#[test]
fn a_relapse_takes_one_death_and_costs_twice_the_time() {
    let mut quarantine = Quarantine::new(config());
    let mut now = SECOND;
    (0..2).for_each(|_| assert_eq!(quarantine.died(of("GET /bad"), now), []));
    let mut times = Vec::new();
    for _ in 0..10 {
        let verdicts = quarantine.died(of("GET /bad"), now);
        let [Verdict::Refused { time, .. }] = verdicts[..] else { panic!("{verdicts:?}") };
        times.push(time.as_secs());
        assert_eq!(quarantine.list(now).len(), 1);
        now = quarantine.next_deadline().unwrap();
        assert_eq!(quarantine.tick(now), [Verdict::Released { key: "GET /bad".to_owned() }]);
        assert_eq!(quarantine.list(now), []);
    }
    assert_eq!(times, [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600, 3600]);
    now = quarantine.next_deadline().unwrap();
    assert_eq!(
        (quarantine.tick(now), quarantine.next_deadline()),
        (Vec::new(), None),
        "it has caused no further death"
    );
    assert_eq!(quarantine.died(of("GET /bad"), now), []);
}

#[test]
fn the_record_of_a_request_that_an_operator_releases_is_cleared() {
    let mut quarantine = Quarantine::new(config());
    for bad in ["GET /a", "GET /b"] {
        (0..3).for_each(|_| drop(quarantine.died(of(bad), SECOND)));
    }
    let keys: Vec<String> = quarantine.list(SECOND).into_iter().map(|listed| listed.key).collect();
    assert_eq!(keys, ["GET /a", "GET /b"]);
    assert!(quarantine.release("GET /a") && !quarantine.release("GET /a") && !quarantine.release("GET /c"));
    assert_eq!(quarantine.died(of("GET /a"), SECOND), [], "one death is not enough again");
    assert_eq!((quarantine.release_all(), quarantine.release_all()), (1, 0));
    assert_eq!(quarantine.next_deadline(), None);
}
