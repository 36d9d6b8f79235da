//! How requests to the API server fare: a sentence for each kind of failure, and since when.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Chain;
use tokio::sync::watch;
use tokio::time::Instant;

use super::server_clock::ServerClock;

/// Failures in a row before a problem is reported: a restart of the API server is one.
const REPORTED_AFTER: u32 = 2;
/// The most characters of a message of the server.
const LONGEST_MESSAGE: usize = 300;

/// The most problems that are told at a time: objects of anybody can be the reason of one each.
const MOST_PROBLEMS: usize = 50;

/// Wakes who waits for changes of a view.
#[derive(Clone, Debug)]
pub(crate) struct Notifier(Arc<watch::Sender<u64>>);

impl Notifier {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }

    pub(crate) fn notify(&self) {
        self.0.send_modify(|count| *count = count.wrapping_add(1));
    }

    pub(crate) fn listen(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }
}

/// The objects that a request is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// The plural with its API group, as `kubectl` takes it: `endpointslices.discovery.k8s.io`.
    pub resource: &'static str,
    /// `None`: all namespaces.
    pub namespace: Option<String>,
}

impl Target {
    pub(crate) fn new(resource: &'static str, namespace: Option<&str>) -> Self {
        Self {
            resource,
            namespace: namespace.map(str::to_owned),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.resource, place(self.namespace.as_deref()))
    }
}

/// `in namespace x`, or `in all namespaces`.
pub(crate) fn place(namespace: Option<&str>) -> String {
    match namespace {
        Some(namespace) => format!("in namespace {namespace}"),
        None => "in all namespaces".to_owned(),
    }
}

/// A kind of request to the API server, which a role may allow.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ApiRequest {
    /// `list`, `watch`, …
    pub verb: &'static str,
    /// The objects that the request is about.
    pub target: Target,
}

impl ApiRequest {
    /// The sentence for a request that is not allowed.
    pub fn refusal(&self) -> String {
        format!(
            "the service account may not {self}: the chart's {} allows it",
            self.role()
        )
    }

    /// The object of the chart that gives the permission.
    fn role(&self) -> &'static str {
        match (self.verb, self.target.resource) {
            (_, "configmaps" | "daemonsets.apps") | ("get", "pods") => {
                "Role in the balancer's namespace"
            }
            _ => "ClusterRole",
        }
    }

    /// The command that shows whether `user` may send it.
    fn check(&self, user: Option<&str>) -> String {
        let Target {
            resource,
            namespace,
        } = &self.target;
        let scope = match namespace {
            Some(namespace) => format!("--namespace {namespace}"),
            None => "--all-namespaces".to_owned(),
        };
        let user = user.map_or_else(String::new, |user| format!(" --as {user}"));
        format!("kubectl auth can-i {} {resource} {scope}{user}", self.verb)
    }
}

impl fmt::Display for ApiRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verb, self.target)
    }
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ApiError {
    /// There was no answer that could be understood.
    Unreachable(String),
    /// 401.
    Unauthorized,
    /// 403, and who was refused, where the server says it.
    Forbidden(ApiRequest, Option<String>),
    /// Any other status, and the server's message.
    Refused(ApiRequest, u16, String),
    /// This node's report can't be written, whatever the API server says.
    Unwritten(String),
}

impl ApiError {
    /// What an error of the client means; `None`: 410, which a new list puts right.
    pub(crate) fn of(error: &kube::Error, verb: &'static str, target: &Target) -> Option<Self> {
        match error {
            kube::Error::Api(status) => Self::of_status(status, verb, target),
            other => Some(Self::Unreachable(with_causes(other))),
        }
    }

    pub(crate) fn of_status(
        status: &kube::core::Status,
        verb: &'static str,
        target: &Target,
    ) -> Option<Self> {
        let target = target.clone();
        let request = ApiRequest { verb, target };
        match status.code {
            410 => None,
            401 => Some(Self::Unauthorized),
            403 => Some(Self::Forbidden(request, user(&status.message))),
            code => Some(Self::Refused(request, code, shortened(&status.message))),
        }
    }

    /// Whether only a change of the configuration helps. Such an error is reported at once.
    fn is_refusal(&self) -> bool {
        matches!(self, Self::Unauthorized | Self::Forbidden(..))
    }

    /// What identifies the problem: errors that differ in details alone have one key.
    fn key(&self) -> String {
        match self {
            Self::Unreachable(_) => "unreachable".to_owned(),
            Self::Unauthorized => "unauthorized".to_owned(),
            Self::Forbidden(request, _) => format!("forbidden {request}"),
            Self::Refused(request, code, _) => format!("refused {request} {code}"),
            Self::Unwritten(_) => "unwritten".to_owned(),
        }
    }

    fn sentence(&self, server: &str) -> String {
        match self {
            Self::Unreachable(why) => format!(
                "the API server at {server} does not answer ({why}): what is known of the cluster \
                 grows old. See whether it runs, and whether this node reaches it (a network \
                 policy, a firewall, KUBERNETES_SERVICE_HOST)"
            ),
            Self::Unauthorized => format!(
                "the API server at {server} does not know who the balancer is (401): its token has \
                 expired or belongs to another cluster. See the pod's service account and its \
                 mounted token, or the user of KUBECONFIG"
            ),
            Self::Forbidden(request, user) => {
                let check = request.check(user.as_deref());
                format!("{}. Try `{check}`", request.refusal())
            }
            Self::Refused(request, code, message) => {
                format!("the API server at {server} answers {code} to {request}: {message}")
            }
            Self::Unwritten(why) => format!(
                "this node's report can't be published ({why}): the other daemons compute quotas \
                 without it"
            ),
        }
    }
}

/// An error with its causes, each said once, on one line.
fn with_causes(error: &kube::Error) -> String {
    let mut text = error.to_string();
    for cause in Chain::new(error).skip(1).take(8) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    shortened(&text)
}

/// A message in one line that is not too long: it may quote what anybody wrote.
pub(super) fn shortened(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(LONGEST_MESSAGE) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// The part in quotes of `… User "system:serviceaccount:a:b" cannot …`, if a shell takes it
/// without quotes.
fn user(message: &str) -> Option<String> {
    let (_, rest) = message.split_once("User \"")?;
    let (user, _) = rest.split_once('"')?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '.' | '_' | '@');
    (!user.is_empty() && user.chars().all(plain)).then(|| user.to_owned())
}

/// How one kind of request fares.
#[derive(Debug)]
pub(crate) struct Health {
    pub(crate) target: Target,
    /// The time as the answers tell it.
    pub(crate) clock: ServerClock,
    failures: Mutex<Option<Failures>>,
    notifier: Notifier,
}

/// Failures without a success in between.
#[derive(Debug)]
struct Failures {
    since: Instant,
    count: u32,
    last: ApiError,
}

impl Health {
    pub(crate) fn new(target: Target, notifier: &Notifier) -> Self {
        Self {
            target,
            clock: ServerClock::default(),
            failures: Mutex::default(),
            notifier: notifier.clone(),
        }
    }

    fn failures(&self) -> MutexGuard<'_, Option<Failures>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn succeeded(&self) {
        if self.failures().take().is_some() {
            self.notifier.notify();
        }
    }

    pub(crate) fn failed(&self, last: ApiError) {
        let mut failures = self.failures();
        let (since, count) = match &*failures {
            Some(before) => (before.since, before.count.saturating_add(1)),
            None => (Instant::now(), 1),
        };
        *failures = Some(Failures { since, count, last });
        drop(failures);
        self.notifier.notify();
    }

    /// The time since the first failure after the last success; zero while it works.
    pub(crate) fn failing_for(&self) -> Duration {
        let failures = self.failures();
        failures
            .as_ref()
            .map_or(Duration::ZERO, |failures| failures.since.elapsed())
    }

    pub(crate) fn is_failing(&self) -> bool {
        self.failures().is_some()
    }

    /// Adds the problem that its failures are, if any.
    pub(crate) fn add_to(&self, problems: &mut Problems, server: &str) {
        let failures = self.failures();
        let Some(Failures { count, last, .. }) = &*failures else {
            return;
        };
        if last.is_refusal() || *count >= REPORTED_AFTER {
            let problem = problems.0.entry(last.key());
            problem.or_insert_with(|| last.sentence(server));
        }
    }
}

/// Sentences, each under the key of its problem.
#[derive(Debug, Default)]
pub(crate) struct Problems(BTreeMap<String, String>);

impl Problems {
    /// A problem that its sentence identifies. Of more than [`MOST_PROBLEMS`] the rest is left out.
    pub(crate) fn add(&mut self, sentence: String) {
        if self.0.len() < MOST_PROBLEMS {
            self.0.insert(sentence.clone(), sentence);
        } else {
            let more = "there are more problems than these";
            self.0.insert(more.to_owned(), more.to_owned());
        }
    }

    pub(crate) fn sentences(&self) -> Vec<String> {
        self.0.values().cloned().collect()
    }

    /// The sentences whose keys `other` has not.
    fn without(&self, other: &Self) -> Vec<String> {
        let missing = self.0.iter().filter(|(key, _)| !other.0.contains_key(*key));
        missing.map(|(_, sentence)| sentence.clone()).collect()
    }
}

/// Logs each problem once when it appears and once when it has gone.
#[derive(Debug, Default)]
pub(crate) struct ProblemLog(Problems);

impl ProblemLog {
    pub(crate) fn note(&mut self, problems: Problems) {
        let (new, gone) = self.differences(problems);
        for sentence in new {
            tracing::warn!("Kubernetes: {sentence}");
        }
        for sentence in gone {
            tracing::info!("Kubernetes: over: {sentence}");
        }
    }

    fn differences(&mut self, now: Problems) -> (Vec<String>, Vec<String>) {
        let differences = (now.without(&self.0), self.0.without(&now));
        self.0 = now;
        differences
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health() -> Health {
        let target = Target::new("endpointslices.discovery.k8s.io", Some("x"));
        Health::new(target, &Notifier::new())
    }

    fn reported(health: &Health) -> Vec<String> {
        let mut problems = Problems::default();
        health.add_to(&mut problems, "https://api:6443");
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
    async fn failing_begins_with_the_first_failure_and_ends_with_a_success() {
        let health = health();
        assert_eq!(health.failing_for(), Duration::ZERO);
        health.failed(ApiError::Unreachable("refused".to_owned()));
        assert!(reported(&health).is_empty(), "one failure is not reported");
        tokio::time::advance(Duration::from_secs(40)).await;
        health.failed(ApiError::Unauthorized);
        health.failed(ApiError::Unreachable("refused".to_owned()));
        assert_eq!(health.failing_for(), Duration::from_secs(40));
        assert!(reported(&health)[0].contains("https://api:6443"));
        health.succeeded();
        assert_eq!(health.failing_for(), Duration::ZERO);
        assert!(reported(&health).is_empty());
    }

    #[test]
    fn a_refusal_says_which_permission_and_how_to_check_it() {
        let health = health();
        let error = status(
            403,
            "endpointslices.discovery.k8s.io is forbidden: User \"system:serviceaccount:balancer:agent\" cannot list resource",
        );
        health.failed(ApiError::of(&error, "list", &health.target).unwrap());
        let sentence = &reported(&health)[0];
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
    fn gone_is_no_error_and_another_status_is_quoted() {
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
    fn problems_without_number_are_told_in_part() {
        let mut problems = Problems::default();
        for number in 0..1000 {
            problems.add(format!("{number}"));
        }
        assert_eq!(problems.sentences().len(), MOST_PROBLEMS + 1);
        let more = problems.sentences().pop();
        assert_eq!(more.as_deref(), Some("there are more problems than these"));
    }

    #[test]
    fn a_problem_is_logged_once_when_it_comes_and_once_when_it_goes() {
        let mut log = ProblemLog::default();
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
        assert_eq!(log.differences(problems(&["refused"])).0.len(), 1);
        assert_eq!(
            log.differences(problems(&["timed out"])),
            (vec![], vec![]),
            "the same problem with another detail"
        );
        assert_eq!(log.differences(problems(&[])).1.len(), 1);
    }
}
