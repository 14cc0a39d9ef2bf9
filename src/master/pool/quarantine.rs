//! Decides which requests are refused for a while because they have killed workers, without a system call.
//!
//! Each crash provides evidence: the request that the crashing thread was working on, if the last words contain this
//! request; otherwise the requests that all threads were working on, if these are known; otherwise all requests in
//! flight, if all of them are known. A request is found guilty in one of these cases:
//! - The request was the only evidence for N deaths within the window, or for one death shortly after the request's
//!   release. A death is not counted if the worker was killed for its use of a resource such as memory, because the
//!   request that was running at that moment need not be the one that used the resource.
//! - The request was among the evidence for each of the last N deaths, it was not in flight in any surviving worker
//!   when they occurred, and no other request meets both conditions. A popular request that is in flight at each death
//!   is therefore not refused, because other workers are serving it as well. If there are no other workers, this rule
//!   finds no request guilty.
//!
//! Paths are examined first. If no path is guilty, requests that differ only in numbers and ids count as the same
//! request, and are examined again. The requests in flight were reported by the dead worker: a false report can cause
//! requests to be refused, but cannot make memory grow.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::supervisor::Uptime;
use crate::config::failures::QuarantineConfig;
use crate::config::millis;
use crate::diagnostics::request_key::RequestKey;
use crate::upgrade::saved_state::SavedRefusal;

/// Maximum number of remembered deaths.
const DEATHS: usize = 256;
/// Maximum number of records of requests.
const RECORDS: usize = 1024;
/// Maximum duration of one refusal, unless the configured time is longer.
const MAX_TIME: Duration = Duration::from_secs(60 * 60);

/// A crash, with the evidence of its cause.
#[derive(Clone, Debug, Default)]
pub(crate) struct Death {
    pub(crate) in_flight: Vec<RequestKey>,
    /// Whether `in_flight` is complete.
    pub(crate) complete: bool,
    /// The request that the crashing thread was working on.
    pub(crate) culprit: Option<RequestKey>,
    /// The requests that all threads were working on, if these are known and the culprit is unknown.
    pub(crate) running: Option<Vec<RequestKey>>,
    /// Whether the code that was running caused the death, rather than the resources that the worker had used before.
    pub(crate) by_itself: bool,
    /// The number of surviving workers; 0 if their requests are not all known.
    pub(crate) live_workers: usize,
    /// The requests that the surviving workers were serving.
    pub(crate) elsewhere: Vec<RequestKey>,
}

/// A decision, for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Refused { key: String, time: Duration, times: u32 },
    Released { key: String },
}

/// A refused request, for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) key: String,
    pub(crate) left: Duration,
    /// Number of times that the request has been quarantined in this series, including the current quarantine.
    pub(crate) times: u32,
}

#[derive(Debug)]
pub(crate) struct Quarantine {
    config: QuarantineConfig,
    deaths: VecDeque<(Uptime, Death)>,
    records: BTreeMap<String, Record>,
}

/// A request that was found guilty. The record is kept until the request has caused no death for long enough.
#[derive(Debug)]
struct Record {
    refused: bool,
    /// The time at which the request is released; after the release, the time at which the record is dropped.
    until: Uptime,
    time: Duration,
    times: u32,
}

type Key = for<'a> fn(&'a RequestKey) -> Option<&'a str>;

impl Quarantine {
    pub(crate) fn limits(&self) -> QuarantineConfig {
        self.config
    }

    pub(crate) fn new(config: QuarantineConfig) -> Self {
        Self { config, deaths: VecDeque::new(), records: BTreeMap::new() }
    }

    pub(crate) fn set_limits(&mut self, config: QuarantineConfig) {
        self.config = config;
    }

    /// Returns the saved form, for the next master during an upgrade.
    pub(crate) fn save(&self, now: Uptime) -> Vec<SavedRefusal> {
        let save = |(request, record): (&String, &Record)| SavedRefusal {
            request: request.clone(),
            refused: record.refused,
            left_ms: millis(record.until.saturating_sub(now)),
            time_ms: millis(record.time),
            times: record.times,
        };
        self.records.iter().map(save).collect()
    }

    /// Restores the records of a former master. The deaths that the former master remembered are not saved.
    pub(crate) fn restore(&mut self, saved: Vec<SavedRefusal>, now: Uptime) {
        for SavedRefusal { request, refused, left_ms, time_ms, times } in saved.into_iter().take(RECORDS) {
            let until = now.saturating_add(Duration::from_millis(left_ms));
            self.records.insert(request, Record { refused, until, time: Duration::from_millis(time_ms), times });
        }
    }

    /// Records that a worker crashed, and decides whether a request must be refused.
    pub(crate) fn died(&mut self, death: Death, now: Uptime) -> Vec<Verdict> {
        // There is no evidence without a request that can be identified.
        let is_evidence =
            death.culprit.is_some() || death.running.is_some() || (death.complete && !death.in_flight.is_empty());
        if self.config.deaths == 0 || !is_evidence {
            return Vec::new();
        }
        self.deaths.push_back((now, death));
        let window = self.config.window;
        self.deaths.retain(|(at, _)| now.saturating_sub(*at) <= window);
        while self.deaths.len() > DEATHS {
            self.deaths.pop_front();
        }
        let levels: [Key; 2] = [|suspect| Some(&suspect.path), |suspect| suspect.pattern.as_deref()];
        for key_of in levels {
            if let Some(culprit) = self.find_culprit(key_of) {
                let verdict = self.refuse(culprit.clone(), now);
                self.deaths.retain(|(_, death)| !death.evidence(key_of).contains(culprit.as_str()));
                return vec![verdict];
            }
        }
        Vec::new()
    }

    /// Returns the request that is guilty of the last death, if there is one.
    fn find_culprit(&self, key_of: Key) -> Option<String> {
        let (_, last) = self.deaths.back()?;
        let enough = self.config.deaths as usize;
        let evidence = last.evidence(key_of);
        if let [one] = evidence.iter().copied().collect::<Vec<_>>()[..] {
            let is_alone = |death: &Death| death.is_certain() && death.evidence(key_of) == evidence;
            let alone = self.deaths.iter().filter(|(_, death)| is_alone(death)).count();
            let recently_released = last.is_certain() && self.records.get(one).is_some_and(|record| !record.refused);
            if alone >= enough || recently_released {
                return Some(one.to_owned());
            }
        }
        let recent = || self.deaths.iter().rev().take(enough).map(|(_, death)| death);
        if self.deaths.len() < enough || recent().any(|death| death.live_workers == 0) {
            return None;
        }
        let is_guilty = |key: &&str| {
            let served_elsewhere = |death: &Death| death.elsewhere.iter().any(|suspect| key_of(suspect) == Some(*key));
            recent().all(|death| death.evidence(key_of).contains(*key) && !served_elsewhere(death))
        };
        let mut culprit = evidence.into_iter().filter(is_guilty);
        let one = culprit.next()?;
        culprit.next().is_none().then(|| one.to_owned())
    }

    fn refuse(&mut self, key: String, now: Uptime) -> Verdict {
        let times = self.records.get(&key).map_or(0, |record| record.times).saturating_add(1);
        let longest = MAX_TIME.max(self.config.time);
        let time = self.config.time.saturating_mul(1 << (times - 1).min(16)).min(longest);
        if self.records.len() >= RECORDS
            && let Some(oldest) = self.records.iter().min_by_key(|(_, record)| record.until).map(|(key, _)| key.clone())
        {
            self.records.remove(&oldest);
        }
        self.records.insert(key.clone(), Record { refused: true, until: now + time, time, times });
        Verdict::Refused { key, time, times }
    }

    /// Releases requests whose quarantine has expired, and drops the records of requests that have caused no death for
    /// long enough after their release.
    pub(crate) fn tick(&mut self, now: Uptime) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        self.records.retain(|_, record| record.refused || record.until > now);
        for (key, record) in self.records.iter_mut().filter(|(_, record)| record.refused && record.until <= now) {
            record.refused = false;
            record.until = now + record.time.max(self.config.window);
            verdicts.push(Verdict::Released { key: key.clone() });
        }
        verdicts
    }

    /// Returns the time at which [`Quarantine::tick`] is due.
    pub(crate) fn next_deadline(&self) -> Option<Uptime> {
        self.records.values().map(|record| record.until).min()
    }

    /// Returns the refused requests, the longest remaining time first.
    pub(crate) fn list(&self, now: Uptime) -> Vec<Listed> {
        let refused = self.records.iter().filter(|(_, record)| record.refused);
        let listed = |(key, record): (&String, &Record)| {
            let left = record.until.saturating_sub(now);
            Listed { key: key.clone(), left, times: record.times }
        };
        let mut list: Vec<Listed> = refused.map(listed).collect();
        list.sort_by_key(|listed| std::cmp::Reverse(listed.left));
        list
    }

    /// Releases one request, and clears its earlier quarantines. Returns false if the request was not quarantined.
    pub(crate) fn release(&mut self, key: &str) -> bool {
        self.records.remove(key).is_some_and(|record| record.refused)
    }

    /// Releases all requests. Returns the number of refused ones.
    pub(crate) fn release_all(&mut self) -> usize {
        let records = std::mem::take(&mut self.records);
        records.values().filter(|record| record.refused).count()
    }
}

impl Death {
    /// Returns the requests that may have caused the death.
    fn evidence(&self, key_of: Key) -> BTreeSet<&str> {
        match (&self.culprit, &self.running) {
            (Some(culprit), _) => key_of(culprit).into_iter().collect(),
            (None, Some(running)) => running.iter().filter_map(key_of).collect(),
            (None, None) => self.in_flight.iter().filter_map(key_of).collect(),
        }
    }

    /// Whether a request that is the only evidence is certainly to blame.
    fn is_certain(&self) -> bool {
        self.culprit.is_some() || self.by_itself
    }
}

#[cfg(test)]
mod tests;
