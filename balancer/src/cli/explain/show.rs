//! How an explanation is shown.

use std::net::SocketAddr;

use serde::Serialize;

use super::ends::{From, To};
use super::netns::Pods;
use crate::cli::output::{Column, or, span, table, wrapped};
use crate::dataplane::{Avoided, Explanation, ListeningBackend, SeveralNetns, Unsuited};
use crate::health::{in_words, reason};

#[derive(Serialize)]
pub(in crate::cli) struct Json<'a> {
    schema: u32,
    from: String,
    to: String,
    netns: Option<u64>,
    service: Option<&'a str>,
    reason: Option<&'static str>,
    verdict: Option<&'static str>,
    backend: Option<JsonBackend>,
    unsuited: Vec<JsonUnsuited>,
    avoided: Vec<JsonAvoided>,
    /// The netns to choose from, where the answer depends on it.
    choices: &'a [Choice],
    sentence: &'a str,
}

#[derive(Serialize)]
struct JsonBackend {
    slot: u32,
    address: SocketAddr,
}

#[derive(Serialize)]
struct JsonUnsuited {
    slot: u32,
    address: SocketAddr,
    why: &'static str,
}

#[derive(Serialize)]
struct JsonAvoided {
    slot: u32,
    address: SocketAddr,
    health: &'static str,
    since_ms: u128,
    reason: Option<&'static str>,
}

/// One of the netns that the answer depends on.
#[derive(Serialize)]
pub(in crate::cli) struct Choice {
    netns: u64,
    /// The pod that has it; `None`: none is known, or several share it.
    pod: Option<String>,
    backends: Vec<JsonListener>,
    /// What to run to have the answer for it.
    command: String,
}

#[derive(Serialize)]
struct JsonListener {
    slot: u32,
    address: SocketAddr,
    state: &'static str,
}

impl<'a> Json<'a> {
    pub(in crate::cli) fn new(from: From, to: To, explanation: &'a Explanation) -> Self {
        let unsuited = |unsuited: &Unsuited| JsonUnsuited {
            slot: unsuited.backend.slot,
            address: unsuited.backend.address,
            why: unsuited.why,
        };
        let avoided = |avoided: &Avoided| JsonAvoided {
            slot: avoided.backend.slot,
            address: avoided.backend.address,
            health: avoided.state.name(),
            since_ms: avoided.age.as_millis(),
            reason: reason(avoided.state),
        };
        Self {
            schema: 1,
            from: from.to_string(),
            to: to.to_string(),
            netns: Some(explanation.netns),
            service: explanation.service.as_deref(),
            reason: explanation.reason.map(balancer_common::Reason::name),
            verdict: Some(explanation.verdict.name()),
            backend: explanation.backend.map(|backend| JsonBackend {
                slot: backend.slot,
                address: backend.address,
            }),
            unsuited: explanation.unsuited.iter().map(unsuited).collect(),
            avoided: explanation.avoided.iter().map(avoided).collect(),
            choices: &[],
            sentence: &explanation.sentence,
        }
    }

    pub(in crate::cli) fn of_several(from: From, to: To, several: &'a Several) -> Self {
        Self {
            schema: 1,
            from: from.to_string(),
            to: to.to_string(),
            netns: None,
            service: Some(&several.service),
            reason: None,
            verdict: None,
            backend: None,
            unsuited: Vec::new(),
            avoided: Vec::new(),
            choices: &several.choices,
            sentence: &several.sentence,
        }
    }
}

pub(in crate::cli) fn text(from: From, to: To, explanation: &Explanation) -> String {
    let mut text = wrapped(&format!("{from} -> {to}: "), &explanation.sentence);
    let service = explanation
        .service
        .as_deref()
        .unwrap_or("none: nobody is steered or refused there");
    text += &wrapped("  service  ", service);
    text += &wrapped("  verdict  ", explanation.verdict.name());
    if let Some(reason) = explanation.reason {
        text += &wrapped(
            "  reason   ",
            &format!("{}: {}", reason.name(), reason.meaning()),
        );
    }
    if let Some(backend) = &explanation.backend {
        text += &wrapped("  backend  ", &name(backend));
    }
    text + &unsuited_text(&explanation.unsuited) + &avoided_text(&explanation.avoided)
}

/// The most unsuited or avoided backends that are shown to people.
const SHOWN: usize = 8;

fn unsuited_text(unsuited: &[Unsuited]) -> String {
    let mut text: String = unsuited
        .iter()
        .take(SHOWN)
        .map(|unsuited| {
            let words = format!("{}: it {}", name(&unsuited.backend), unsuited.why);
            wrapped("  unsuited ", &words)
        })
        .collect();
    if unsuited.len() > SHOWN {
        text += &wrapped("  unsuited ", &format!("{} more", unsuited.len() - SHOWN));
    }
    text
}

fn avoided_text(avoided: &[Avoided]) -> String {
    let words = |avoided: &Avoided| {
        let why = in_words(avoided.state, span(avoided.age)).unwrap_or_default();
        format!("{}: {why}", name(&avoided.backend))
    };
    let shown = avoided.iter().take(SHOWN).map(words);
    let more = avoided.len().saturating_sub(SHOWN);
    let more = (more > 0).then(|| format!("{more} more"));
    let lines = shown.chain(more);
    lines.map(|words| wrapped("  avoided  ", &words)).collect()
}

fn name(backend: &ListeningBackend) -> String {
    format!("{} (slot {})", backend.address, backend.slot)
}

/// The netns to choose from.
pub(in crate::cli) struct Several {
    service: String,
    choices: Vec<Choice>,
    sentence: String,
}

impl Several {
    /// `asked` is the command that did not say which.
    pub(in crate::cli) fn new(several: &SeveralNetns, pods: &Pods, asked: &str) -> Self {
        let choice = |(netns, backends): &(u64, Vec<ListeningBackend>)| {
            let here = pods.get(netns).filter(|pods| pods.len() == 1);
            let pod = here.and_then(|pods| pods.first()).map(ToString::to_string);
            let option = match &pod {
                Some(pod) => format!("--pod {pod}"),
                None => format!("--netns {netns}"),
            };
            Choice {
                netns: *netns,
                pod,
                backends: backends.iter().map(listener).collect(),
                command: format!("{asked} {option}"),
            }
        };
        let sentence = format!(
            "{} has backends in {} network namespaces, and none in that of this command: say \
             which one is meant",
            several.service,
            several.netns.len()
        );
        Self {
            service: several.service.clone(),
            choices: several.netns.iter().map(choice).collect(),
            sentence,
        }
    }

    pub(in crate::cli) fn text(&self, from: From, to: To) -> String {
        let mut text = wrapped(&format!("{from} -> {to}: "), &self.sentence);
        text += &self.table();
        // In one piece, to be copied.
        let commands = self.choices.iter();
        text.extend(commands.map(|choice| format!("  {}\n", choice.command)));
        text
    }

    fn table(&self) -> String {
        let rows: Vec<(&Choice, &JsonListener)> = self
            .choices
            .iter()
            .flat_map(|choice| {
                choice
                    .backends
                    .iter()
                    .map(move |listener| (choice, listener))
            })
            .collect();
        let column = |heading, cell: &dyn Fn(&Choice, &JsonListener) -> String| {
            let cells = rows.iter().map(|(choice, listener)| cell(choice, listener));
            let cells = cells.collect();
            Column { heading, cells }
        };
        let mut columns = vec![column(">NETNS", &|choice, _| choice.netns.to_string())];
        if self.choices.iter().any(|choice| choice.pod.is_some()) {
            columns.push(column("POD", &|choice, _| or(choice.pod.as_ref(), "-")));
        }
        columns.push(column(">SLOT", &|_, listener| listener.slot.to_string()));
        columns.push(column("BACKEND", &|_, listener| {
            listener.address.to_string()
        }));
        columns.push(column("STATE", &|_, listener| listener.state.to_owned()));
        table(columns, &["SLOT"])
    }
}

fn listener(backend: &ListeningBackend) -> JsonListener {
    JsonListener {
        slot: backend.slot,
        address: backend.address,
        state: backend.state.name(),
    }
}
