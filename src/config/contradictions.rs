//! Finds settings that are valid on their own but contradict each other.

use super::Config;
use crate::sys;

/// Descriptors that a worker needs in addition to those for its connections.
const OTHER_DESCRIPTORS: u64 = 64;

impl Config {
    /// Returns the descriptor limit of the processes that accept connections, if that is known. `--rlimit` does not apply
    /// to gateways.
    pub(crate) fn most_descriptors(&self) -> Option<u64> {
        match self.gateway {
            Some(_) => sys::hard_descriptor_limit(),
            None => self.privileges.most_descriptors(),
        }
    }

    /// Returns a message for the operator for each contradiction. `descriptors` is the descriptor limit of a worker, if
    /// that is known.
    pub(crate) fn contradictions(&self, descriptors: Option<u64>) -> Vec<String> {
        let limits = &self.limits;
        let connections = limits.max_connections;
        let subscribers = self.events.max_subscribers;
        let mut found = Vec::new();
        // External programs have no such limits.
        if connections == 0 {
            return found;
        }
        if self.events.bytes > 0 && subscribers >= connections {
            found.push(format!(
                "--max-subscribers {subscribers} is not below --max-connections {connections}: each subscriber over HTTP/1 or SCGI holds a connection, so streams can leave none for other requests (raise --max-connections)"
            ));
        }
        if let Some(descriptors) = descriptors.filter(|&most| most < u64::from(connections) + OTHER_DESCRIPTORS) {
            found.push(format!(
                "--max-connections {connections} needs {} descriptors per worker, and the limit is {descriptors} (raise the hard limit: ulimit -n, LimitNOFILE= or --rlimit nofile=N; or lower --max-connections)",
                u64::from(connections) + OTHER_DESCRIPTORS
            ));
        }
        if limits.max_connections_per_address >= connections {
            found.push(format!(
                "--max-connections-per-address {} has no effect: it is not below --max-connections {connections}",
                limits.max_connections_per_address
            ));
        }
        if limits.max_uri > limits.max_params {
            found.push(format!(
                "--max-uri {} has no effect: a request with a path that long has a head larger than --max-params {}",
                limits.max_uri, limits.max_params
            ));
        }
        let buffered = limits.max_buffered;
        if buffered > 0 && buffered < 4 * limits.max_params as u64 {
            found.push(format!(
                "--max-buffered {buffered} is less than four heads of --max-params {}",
                limits.max_params
            ));
        }
        found
    }
}
