//! Which requests are refused for a while because workers died of them: decided without a single system call.
//!
//! Each death by a crash brings evidence: the request that the crashing thread was at work on, if its last words tell;
//! else those that any thread was at work on, if it had no last words; else all that were in flight, if they are all known.
//! A request is found guilty when
//! - it alone was the evidence of N deaths within the window, or of a single one shortly after it was let go, unless the worker
//!   was killed for what it used, like memory: what runs at that moment need not be what used it; or
//! - it was among the evidence of each of the last N deaths, was not in flight in any worker that lived on at those
//!   moments, and nothing else was both. So a popular request that is in flight beside the poison each time goes
//!   free: other workers serve it. Where there is no other worker this rule finds nobody guilty.
//!
//! First paths are judged. If no path is guilty, requests that differ in their numbers alone are taken for the same,
//! and judged again. What was in flight is the dead worker's word: it can have itself refused, and nobody's memory grown.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::supervisor::Now;
use crate::config::failures::QuarantineConfig;
use crate::diagnostics::request_key::RequestKey;
use crate::upgrade::saved::SavedRefusal;

/// Deaths that are remembered, and requests.
const DEATHS: usize = 256;
const RECORDS: usize = 1024;
/// No request is refused for longer at a time, unless the operator says so.
const MAX_TIME: Duration = Duration::from_secs(60 * 60);

/// A death by a crash, and what it may be due to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Death {
    pub(crate) in_flight: Vec<RequestKey>,
    /// Whether that is all that was in flight.
    pub(crate) complete: bool,
    /// What the crashing thread was at work on.
    pub(crate) culprit: Option<RequestKey>,
    /// What all threads were at work on, if that is known and the culprit is not.
    pub(crate) running: Option<Vec<RequestKey>>,
    /// It died of what it did, and not because of what it had used up till then.
    pub(crate) by_itself: bool,
    /// How many other workers lived on, and what they were serving. None counts if that is not all known.
    pub(crate) live_workers: usize,
    pub(crate) elsewhere: Vec<RequestKey>,
}

/// What an operator should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Refused { key: String, time: Duration, times: u32 },
    Released { key: String },
}

/// A request that is refused, for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) key: String,
    pub(crate) left: Duration,
    /// How often it has been refused in a row of relapses, this time included.
    pub(crate) times: u32,
}

#[derive(Debug)]
pub(crate) struct Quarantine {
    config: QuarantineConfig,
    deaths: VecDeque<(Now, Death)>,
    records: BTreeMap<String, Record>,
}

/// A request that was found guilty, until it has been good for long enough.
#[derive(Debug)]
struct Record {
    refused: bool,
    /// It is let go then; or, if it was, forgotten.
    until: Now,
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

    /// For a master that takes over.
    pub(crate) fn save(&self, now: Now) -> Vec<SavedRefusal> {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let save = |(request, record): (&String, &Record)| SavedRefusal {
            request: request.clone(),
            refused: record.refused,
            left_ms: ms(record.until.saturating_sub(now)),
            time_ms: ms(record.time),
            times: record.times,
        };
        self.records.iter().map(save).collect()
    }

    /// Goes on with what a former master knew of requests; the deaths before are forgotten.
    pub(crate) fn restore(&mut self, saved: Vec<SavedRefusal>, now: Now) {
        for SavedRefusal { request, refused, left_ms, time_ms, times } in saved.into_iter().take(RECORDS) {
            let until = now.saturating_add(Duration::from_millis(left_ms));
            self.records.insert(request, Record { refused, until, time: Duration::from_millis(time_ms), times });
        }
    }

    /// A worker has died of a crash.
    pub(crate) fn died(&mut self, death: Death, now: Now) -> Vec<Verdict> {
        // Of a request that nobody can name nothing is known.
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

    /// Who is guilty of the last death, if that can be said.
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

    fn refuse(&mut self, key: String, now: Now) -> Verdict {
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

    /// Lets go whose time is over, and forgets who has been good since.
    pub(crate) fn tick(&mut self, now: Now) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        self.records.retain(|_, record| record.refused || record.until > now);
        for (key, record) in self.records.iter_mut().filter(|(_, record)| record.refused && record.until <= now) {
            record.refused = false;
            record.until = now + record.time.max(self.config.window);
            verdicts.push(Verdict::Released { key: key.clone() });
        }
        verdicts
    }

    /// When [`Quarantine::tick`] has something to do.
    pub(crate) fn next_deadline(&self) -> Option<Now> {
        self.records.values().map(|record| record.until).min()
    }

    /// What is refused now, the longest first.
    pub(crate) fn list(&self, now: Now) -> Vec<Listed> {
        let refused = self.records.iter().filter(|(_, record)| record.refused);
        let listed = |(key, record): (&String, &Record)| {
            let left = record.until.saturating_sub(now);
            Listed { key: key.clone(), left, times: record.times }
        };
        let mut list: Vec<Listed> = refused.map(listed).collect();
        list.sort_by_key(|listed| std::cmp::Reverse(listed.left));
        list
    }

    /// Lets one go and forgets that it was ever refused. False if it was not.
    pub(crate) fn release(&mut self, key: &str) -> bool {
        self.records.remove(key).is_some_and(|record| record.refused)
    }

    /// The same for all; returns how many were refused.
    pub(crate) fn release_all(&mut self) -> usize {
        let records = std::mem::take(&mut self.records);
        records.values().filter(|record| record.refused).count()
    }
}

impl Death {
    /// What it may be due to.
    fn evidence(&self, key_of: Key) -> BTreeSet<&str> {
        match (&self.culprit, &self.running) {
            (Some(culprit), _) => key_of(culprit).into_iter().collect(),
            (None, Some(running)) => running.iter().filter_map(key_of).collect(),
            (None, None) => self.in_flight.iter().filter_map(key_of).collect(),
        }
    }

    /// Whether a request that is its only evidence is to blame.
    fn is_certain(&self) -> bool {
        self.culprit.is_some() || self.by_itself
    }
}

#[cfg(test)]
mod tests;
