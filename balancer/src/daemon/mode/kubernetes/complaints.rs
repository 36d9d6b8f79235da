//! What is wrong with this node's cluster beside what the API server's answers show: a sentence
//! each, logged once, and shown for as long as it is so.

use std::collections::BTreeMap;

use tracing::{info, warn};

/// Sentences by what they are about.
#[derive(Debug, Default)]
pub struct Complaints(BTreeMap<&'static str, Vec<String>>);

impl Complaints {
    /// What there is to complain of now about that.
    pub fn set(&mut self, about: &'static str, sentences: Vec<String>) {
        let before = self.0.entry(about).or_default();
        for sentence in sentences.iter().filter(|new| !before.contains(new)) {
            warn!("{sentence}");
        }
        for sentence in before.iter().filter(|old| !sentences.contains(old)) {
            info!("over: {sentence}");
        }
        *before = sentences;
    }

    /// All sentences.
    pub fn sentences(&self) -> impl Iterator<Item = &String> {
        self.0.values().flatten()
    }
}
