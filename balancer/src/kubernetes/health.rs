//! What goes wrong with the API server: a sentence for each kind, and for how long it has been so.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// A failure that shows up once is not told: an API server that restarts, or a connection that idled out, looks the same.
const TOLD_AFTER: u32 = 2;
/// More of a message of the server than this is cut off, in characters.
const LONGEST_MESSAGE: usize = 300;

/// Rings when anything that a view is made of has changed.
#[derive(Clone, Debug)]
pub(super) struct Notifier(Arc<watch::Sender<u64>>);

impl Notifier {
    pub(super) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }

    pub(super) fn notify(&self) {
        self.0.send_modify(|count| *count = count.wrapping_add(1));
    }

    pub(super) fn listen(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }
}

/// What a request is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Target {
    /// The plural with its API group, as `kubectl` takes it: `endpointslices.discovery.k8s.io`.
    pub(super) resource: &'static str,
    /// `None`: all.
    pub(super) namespace: Option<String>,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ApiError {
    /// There was no answer that could be understood.
    Unreachable(String),
    /// 401.
    Unauthorized,
    /// 403.
    Forbidden {
        verb: &'static str,
        target: Target,
        /// Who was refused, where the server says it.
        user: Option<String>,
    },
    /// Any other status.
    Refused {
        verb: &'static str,
        target: Target,
        code: u16,
        message: String,
    },
    /// What this node counts can't be told to the others, whatever the API server says.
    Unwritten(String),
}

impl ApiError {
    /// What an error of the client means; `None`: 410, which a new list puts right.
    pub(super) fn of(error: &kube::Error, verb: &'static str, target: &Target) -> Option<Self> {
        match error {
            kube::Error::Api(status) => Self::of_status(status, verb, target),
            other => Some(Self::Unreachable(chain(other))),
        }
    }

    pub(super) fn of_status(
        status: &kube::core::Status,
        verb: &'static str,
        target: &Target,
    ) -> Option<Self> {
        match status.code {
            410 => None,
            401 => Some(Self::Unauthorized),
            403 => Some(Self::Forbidden {
                verb,
                target: target.clone(),
                user: user(&status.message),
            }),
            code => Some(Self::Refused {
                verb,
                target: target.clone(),
                code,
                message: shortened(&status.message),
            }),
        }
    }

    /// A configuration has to be changed for it to go: it is told at once.
    fn is_refusal(&self) -> bool {
        matches!(self, Self::Unauthorized | Self::Forbidden { .. })
    }

    /// What it is told under: as long as this stays the same it is the same problem.
    fn key(&self) -> String {
        match self {
            Self::Unreachable(_) => "unreachable".to_owned(),
            Self::Unauthorized => "unauthorized".to_owned(),
            Self::Forbidden { verb, target, .. } => format!("forbidden {verb} {target:?}"),
            Self::Refused {
                verb, target, code, ..
            } => format!("refused {verb} {target:?} {code}"),
            Self::Unwritten(_) => "unwritten".to_owned(),
        }
    }

    fn sentence(&self, server: &str) -> String {
        match self {
            Self::Unreachable(why) => format!(
                "the API server at {server} does not answer ({why}): what is known of the cluster grows old. See whether it runs, and \
                 whether this node reaches it (a network policy, a firewall, KUBERNETES_SERVICE_HOST)"
            ),
            Self::Unauthorized => format!(
                "the API server at {server} does not know who the balancer is (401): its token has expired or belongs to another \
                 cluster. See the pod's service account and its mounted token, or the user of KUBECONFIG"
            ),
            Self::Forbidden { verb, target, user } => {
                let mut text = format!(
                    "the service account may not {verb} {} {}: the chart's {} allows it. Try `kubectl auth can-i {verb} {}",
                    target.resource,
                    place(target.namespace.as_deref()),
                    role(verb, target.resource),
                    target.resource,
                );
                match &target.namespace {
                    Some(namespace) => _ = write!(text, " --namespace {namespace}"),
                    None => text.push_str(" --all-namespaces"),
                }
                if let Some(user) = user {
                    _ = write!(text, " --as {user}");
                }
                text.push('`');
                text
            }
            Self::Refused {
                verb,
                target,
                code,
                message,
            } => format!(
                "the API server at {server} answers {code} to {verb} {} {}: {message}",
                target.resource,
                place(target.namespace.as_deref()),
            ),
            Self::Unwritten(why) => format!(
                "what this node counts can't be published ({why}): the other agents compute quotas without it"
            ),
        }
    }
}

/// `in namespace x`, or `in all namespaces`.
pub(super) fn place(namespace: Option<&str>) -> String {
    match namespace {
        Some(namespace) => format!("in namespace {namespace}"),
        None => "in all namespaces".to_owned(),
    }
}

/// Which object of the chart gives the permission.
pub(super) fn role(verb: &str, resource: &str) -> &'static str {
    match (verb, resource) {
        (_, "configmaps" | "daemonsets.apps") | ("get", "pods") => {
            "Role in the balancer's namespace"
        }
        _ => "ClusterRole",
    }
}

/// An error with everything that it follows from, each said once, on one line.
fn chain(error: &kube::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    for _ in 0..8 {
        let Some(cause) = source else { break };
        let words = cause.to_string();
        if !text.contains(&words) {
            _ = write!(text, ": {words}");
        }
        source = cause.source();
    }
    shortened(&text)
}

fn shortened(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(LONGEST_MESSAGE) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// `pods is forbidden: User "system:serviceaccount:a:b" cannot list …`: the part in quotes, where it is safe to paste into a shell.
fn user(message: &str) -> Option<String> {
    let (_, rest) = message.split_once("User \"")?;
    let (user, _) = rest.split_once('"')?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '.' | '_' | '@');
    (!user.is_empty() && user.chars().all(plain)).then(|| user.to_owned())
}

/// How one kind of request fares.
#[derive(Debug)]
pub(super) struct Health {
    pub(super) target: Target,
    series: Mutex<Series>,
    notifier: Notifier,
}

/// Failures without a success in between.
#[derive(Debug, Default)]
struct Series {
    since: Option<Instant>,
    length: u32,
    last: Option<ApiError>,
}

impl Health {
    pub(super) fn new(
        resource: &'static str,
        namespace: Option<&str>,
        notifier: &Notifier,
    ) -> Self {
        Self {
            target: Target {
                resource,
                namespace: namespace.map(str::to_owned),
            },
            series: Mutex::default(),
            notifier: notifier.clone(),
        }
    }

    /// It works: a series of failures has ended.
    pub(super) fn fine(&self) {
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        if series.since.is_some() {
            *series = Series::default();
            drop(series);
            self.notifier.notify();
        }
    }

    pub(super) fn failed(&self, error: ApiError) {
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        series.since.get_or_insert_with(Instant::now);
        series.length = series.length.saturating_add(1);
        series.last = Some(error);
        drop(series);
        self.notifier.notify();
    }

    /// Since the first failure of the series that goes on.
    pub(super) fn failing_for(&self) -> Duration {
        let series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        series.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    pub(super) fn is_failing(&self) -> bool {
        let series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        series.since.is_some()
    }

    /// Adds what is to be told about it.
    pub(super) fn tell(&self, server: &str, problems: &mut Problems) {
        let series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(error) = &series.last else { return };
        if error.is_refusal() || series.length >= TOLD_AFTER {
            problems
                .0
                .entry(error.key())
                .or_insert_with(|| error.sentence(server));
        }
    }
}

/// Sentences, each under what makes it the same problem.
#[derive(Debug, Default)]
pub(super) struct Problems(BTreeMap<String, String>);

impl Problems {
    /// A problem that its sentence identifies.
    pub(super) fn add(&mut self, sentence: String) {
        self.0.insert(sentence.clone(), sentence);
    }

    pub(super) fn sentences(&self) -> Vec<String> {
        self.0.values().cloned().collect()
    }
}

/// Logs each problem once when it appears and once when it has gone.
#[derive(Debug, Default)]
pub(super) struct ProblemLog(BTreeMap<String, String>);

impl ProblemLog {
    pub(super) fn note(&mut self, problems: Problems) {
        let (new, gone) = self.differences(problems);
        for sentence in new {
            tracing::warn!("Kubernetes: {sentence}");
        }
        for sentence in gone {
            tracing::info!("Kubernetes: over: {sentence}");
        }
    }

    fn differences(&mut self, Problems(now): Problems) -> (Vec<String>, Vec<String>) {
        let new = now
            .iter()
            .filter(|(key, _)| !self.0.contains_key(*key))
            .map(|(_, sentence)| sentence.clone())
            .collect();
        let gone = self
            .0
            .iter()
            .filter(|(key, _)| !now.contains_key(*key))
            .map(|(_, sentence)| sentence.clone())
            .collect();
        self.0 = now;
        (new, gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health() -> Health {
        Health::new(
            "endpointslices.discovery.k8s.io",
            Some("x"),
            &Notifier::new(),
        )
    }

    fn told(health: &Health) -> Vec<String> {
        let mut problems = Problems::default();
        health.tell("https://api:6443", &mut problems);
        problems.sentences()
    }

    fn status(code: u16, message: &str) -> kube::Error {
        kube::Error::Api(Box::new(kube::core::Status {
            code,
            message: message.to_owned(),
            ..kube::core::Status::default()
        }))
    }

    #[tokio::test(start_paused = true)]
    async fn a_series_begins_with_its_first_failure_and_ends_with_a_success() {
        let health = health();
        assert_eq!(health.failing_for(), Duration::ZERO);
        health.failed(ApiError::Unreachable("refused".to_owned()));
        assert!(told(&health).is_empty(), "one failure is not told");
        tokio::time::advance(Duration::from_secs(40)).await;
        health.failed(ApiError::Unauthorized);
        health.failed(ApiError::Unreachable("refused".to_owned()));
        assert_eq!(health.failing_for(), Duration::from_secs(40));
        assert!(told(&health)[0].contains("https://api:6443"));
        health.fine();
        assert_eq!(health.failing_for(), Duration::ZERO);
        assert!(told(&health).is_empty());
    }

    #[test]
    fn a_refusal_says_which_permission_and_how_to_check_it() {
        let health = health();
        let error = status(
            403,
            "endpointslices.discovery.k8s.io is forbidden: User \"system:serviceaccount:balancer:agent\" cannot list resource",
        );
        health.failed(ApiError::of(&error, "list", &health.target).unwrap());
        let sentence = &told(&health)[0];
        for part in [
            "may not list endpointslices.discovery.k8s.io in namespace x",
            "ClusterRole",
            "`kubectl auth can-i list endpointslices.discovery.k8s.io --namespace x --as system:serviceaccount:balancer:agent`",
        ] {
            assert!(sentence.contains(part), "{part:?} is not in {sentence:?}");
        }
    }

    #[test]
    fn a_user_that_a_shell_would_read_is_not_pasted() {
        assert_eq!(user("User \"a; rm b\" cannot"), None);
        assert_eq!(
            user("User \"kube:admin@x.y\" cannot").as_deref(),
            Some("kube:admin@x.y")
        );
    }

    #[test]
    fn gone_is_no_trouble_and_another_status_is_quoted() {
        let target = health().target;
        assert_eq!(
            ApiError::of(&status(410, "too old resource version"), "watch", &target),
            None
        );
        let error = ApiError::of(&status(503, "not\nyet"), "watch", &target).unwrap();
        let sentence = error.sentence("https://api");
        assert!(
            sentence.contains("answers 503") && sentence.contains("not yet"),
            "{sentence}"
        );
    }

    #[test]
    fn the_journal_tells_once_that_a_problem_came_and_once_that_it_went() {
        let mut problem_log = ProblemLog::default();
        let problems = |details: &[&str]| {
            let mut problems = Problems::default();
            for why in details {
                let error = ApiError::Unreachable((*why).to_owned());
                problems
                    .0
                    .insert(error.key(), error.sentence("https://api"));
            }
            problems
        };
        assert_eq!(problem_log.differences(problems(&["refused"])).0.len(), 1);
        assert_eq!(
            problem_log.differences(problems(&["timed out"])),
            (vec![], vec![]),
            "the same problem with another detail"
        );
        assert_eq!(problem_log.differences(problems(&[])).1.len(), 1);
    }
}
