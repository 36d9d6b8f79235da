//! The node reports of all daemons: a `ConfigMap` for each node, in the balancer's own namespace.

use std::sync::Arc;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::{Duration, Instant};

use super::{Bounds, Facts, Heard, Selection};
use crate::kubernetes::health::shortened;
use crate::kubernetes::model::{NodeReport, ObjectName, ReceivedReport, SCHEMA, STALE};
use crate::kubernetes::server_clock::ServerClock;

/// The labels of the `ConfigMap`s that are node reports, in all builds.
pub(crate) const LABELS: [(&str, &str); 2] = [
    ("app.kubernetes.io/name", "balancer"),
    ("app.kubernetes.io/component", "publication"),
];
/// The key of the report in the data of its `ConfigMap`, in all builds.
pub(crate) const KEY: &str = "publication.json";
/// The annotation with the time of a write, in milliseconds since 1970. It makes a renewal a
/// change, which the others are told of, and tells the writer which of its writes has come back.
/// Nobody compares it with a clock.
pub(crate) const WRITTEN: &str = "balancer.skywalking.apache.org/written";
/// The most bytes of a report that are written or read: a `ConfigMap` may have a mebibyte.
pub(crate) const MOST_BYTES: usize = 900 * 1024;

/// The node reports in the balancer's namespace.
pub(super) fn selection(namespace: &str) -> Selection {
    let labels = LABELS.map(|(key, value)| format!("{key}={value}"));
    Selection::labelled(Some(namespace.to_owned()), labels.join(","))
}

/// The name of a node's `ConfigMap`.
pub(crate) fn name_of(node: &str) -> String {
    format!("balancer-{node}")
}

/// How much of all reports together is kept, in KiB: 4 KiB for each of 4,000 nodes.
const MOST_KIB: usize = 16 * 1024;

/// What arrived of a node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct StoredReport {
    /// The version of the `ConfigMap`: a list that brings it again is no news.
    version: Option<String>,
    /// How and when this version came to be known.
    heard: Heard,
    at: Instant,
    /// When the API server took this version, by its own clock.
    taken: Option<Timestamp>,
    /// The value of the annotation [`WRITTEN`].
    pub(crate) written: Option<u64>,
    /// How long its text is, in bytes.
    bytes: usize,
    /// The report; an error is the problem with it.
    parsed: Result<Arc<NodeReport>, String>,
}

impl Facts for StoredReport {
    type Object = ConfigMap;
    const RESOURCE: &'static str = "configmaps";
    const MOST: Bounds = Bounds {
        of_namespace: MOST_KIB,
        in_all: MOST_KIB,
    };
    // Each may have a mebibyte.
    const PAGE: u32 = 4;

    fn digest(map: &ConfigMap, before: Option<&Self>, heard: Heard) -> Option<Self> {
        let version = map.resource_version();
        let before = before.filter(|before| version.is_some() && before.version == version);
        Some(before.cloned().unwrap_or_else(|| {
            Self {
                version,
                heard,
                at: Instant::now(),
                taken: taken(map),
                written: map
                    .annotations()
                    .get(WRITTEN)
                    .and_then(|text| text.parse().ok()),
                bytes: map
                    .data
                    .as_ref()
                    .and_then(|data| data.get(KEY))
                    .map_or(0, String::len),
                parsed: parse(map).map(Arc::new),
            }
        }))
    }

    fn weight(&self) -> usize {
        1 + self.bytes / 1024
    }
}

impl StoredReport {
    /// The report with its age, or the problem with it.
    pub(super) fn received(&self, clock: &ServerClock) -> Result<ReceivedReport, String> {
        Ok(ReceivedReport {
            age: self.age(clock),
            node_report: self.parsed.clone()?,
        })
    }

    /// How long ago it was written. One that is found in a list may be from any time: where the API
    /// server does not tell, it is old until its daemon renews it.
    fn age(&self, clock: &ServerClock) -> Duration {
        let heard = self.at.elapsed();
        if self.heard == Heard::Watched {
            return heard;
        }
        let told = self.taken.and_then(|taken| clock.since(taken));
        heard.max(told.unwrap_or(STALE))
    }
}

/// When a field of the object was changed last. Only the API server writes that.
fn taken(map: &ConfigMap) -> Option<Timestamp> {
    let managers = map.managed_fields().iter();
    managers
        .filter_map(|manager| Some(manager.time.as_ref()?.0))
        .max()
}

/// What a report of any schema has.
#[derive(Deserialize)]
struct AnyReport {
    schema: u32,
}

/// Reads a report, which a daemon of another build may have written, or somebody by hand.
fn parse(map: &ConfigMap) -> Result<NodeReport, String> {
    let data = map.data.as_ref().and_then(|data| data.get(KEY));
    let report = match data {
        None => Err(format!("it has no {KEY}")),
        Some(text) => parse_text(text, &map.name_any()),
    };
    report.map_err(|why| {
        format!(
            "the ConfigMap {} is not the node report of a daemon ({why}): what that node counts is \
             not known here. If nobody but the balancer wrote it, the daemons are of different \
             versions; else delete it",
            ObjectName::of(map)
        )
    })
}

/// Reads the text of a report, which stands in the `ConfigMap` of this name.
///
/// # Errors
/// What is wrong with it.
pub fn parse_text(text: &str, name: &str) -> Result<NodeReport, String> {
    if text.len() > MOST_BYTES {
        return Err(format!("it has {} bytes", text.len()));
    }
    let AnyReport { schema } = read(text)?;
    if schema != SCHEMA {
        return Err(format!(
            "its schema is {schema}, and this daemon reads {SCHEMA}"
        ));
    }
    let report: NodeReport = read(text)?;
    if name_of(&report.node) != name {
        let node = report.node.chars().take(80).collect::<String>();
        return Err(format!("it is about the node {node:?}"));
    }
    report.check()?;
    Ok(report)
}

fn read<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| shortened(&error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::model::{GroupId, Peak, RefusedSource};
    use serde_json::json;

    fn map(name: &str, data: &[(&str, &str)]) -> ConfigMap {
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "balancer", "resourceVersion": "7"},
            "data": data.iter().copied().collect::<std::collections::BTreeMap<_, _>>(),
        }))
        .unwrap()
    }

    fn node_report() -> NodeReport {
        let service = ObjectName {
            namespace: "sw".to_owned(),
            name: "oap".to_owned(),
        };
        let group = GroupId {
            entry: "agents".to_owned(),
            service,
            port: 11800,
        };
        NodeReport {
            schema: SCHEMA,
            node: "node-a".to_owned(),
            backends: Vec::new(),
            peaks: vec![Peak {
                group: group.clone(),
                connections: 7,
                seconds_ago: 0,
            }],
            refused: vec![RefusedSource {
                group,
                source: "10.0.0.9".parse().unwrap(),
                first_seconds_ago: 100,
                last_seconds_ago: 3,
                longest_pause_seconds: 30,
                before_seconds_ago: None,
            }],
            unfit: None,
        }
    }

    #[test]
    fn what_is_wrong_with_a_report_is_told_in_short() {
        let text = format!("\"{}\"", "x".repeat(5_000));
        let problem = parse_text(&text, "balancer-b").expect_err("a string is no report");
        assert!(problem.len() < 400, "{problem}");
    }

    #[test]
    fn what_a_daemon_wrote_is_read_back() {
        let report = node_report();
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(parse(&map("balancer-node-a", &[(KEY, &text)])), Ok(report));
    }

    #[test]
    fn garbage_becomes_a_sentence_that_names_the_config_map() {
        let good = serde_json::to_string(&node_report()).unwrap();
        let other = good.replace("\"schema\":1", "\"schema\":2");
        let deep = "[".repeat(100_000);
        let long = format!("{{\"schema\":1,\"node\":\"{}\"}}", "x".repeat(MOST_BYTES));
        for (name, data, why) in [
            ("balancer-node-a", &[][..], "it has no publication.json"),
            ("balancer-node-a", &[(KEY, "")], "EOF"),
            (
                "balancer-node-a",
                &[(KEY, "{\"schema\":1}")],
                "missing field",
            ),
            (
                "balancer-node-a",
                &[(KEY, "{\"schema\":2,\"later\":true}")],
                "its schema is 2",
            ),
            ("balancer-node-a", &[(KEY, &other)], "its schema is 2"),
            ("balancer-node-a", &[(KEY, &deep)], "line 1"),
            ("balancer-node-a", &[(KEY, &long)], "bytes"),
            (
                "balancer-node-b",
                &[(KEY, &good)],
                "it is about the node \"node-a\"",
            ),
        ] {
            let error = parse(&map(name, data)).unwrap_err();
            assert!(error.contains(&format!("balancer/{name}")), "{error}");
            assert!(error.contains(why) && error.len() < 500, "{why}: {error}");
        }
    }

    #[test]
    fn a_number_out_of_bounds_is_named_with_node_and_field() {
        type Change = fn(&mut NodeReport);
        let cases: [(Change, &str); 10] = [
            (
                |report| report.peaks[0].seconds_ago = u64::MAX,
                "peaks[0].seconds_ago is 18446744073709551615, at most 31536000",
            ),
            (
                |report| report.peaks[0].connections = u64::MAX,
                "peaks[0].connections is 18446744073709551615, at most 100000000",
            ),
            (
                |report| report.refused[0].first_seconds_ago = u64::MAX,
                "refused[0].first_seconds_ago",
            ),
            (
                |report| report.refused[0].last_seconds_ago = 31_536_001,
                "refused[0].last_seconds_ago is 31536001",
            ),
            (
                |report| report.refused[0].longest_pause_seconds = u64::MAX,
                "refused[0].longest_pause_seconds",
            ),
            (
                |report| report.refused[0].before_seconds_ago = Some(31_536_001),
                "refused[0].before_seconds_ago is 31536001",
            ),
            (
                |report| report.refused = vec![report.refused[0].clone(); 1025],
                "number of refused is 1025, at most 1024",
            ),
            (
                |report| report.peaks = vec![report.peaks[0].clone(); 1025],
                "number of peaks is 1025",
            ),
            (
                |report| report.peaks[0].group.entry = "x".repeat(254),
                "peaks[0].group.entry has 254 bytes",
            ),
            (
                |report| report.peaks[0].group.service.name = "x".repeat(70_000),
                "peaks[0].group.service.name has 70000 bytes",
            ),
        ];
        for (change, words) in cases {
            let mut report = node_report();
            change(&mut report);
            let text = serde_json::to_string(&report).unwrap();
            let problem = parse(&map("balancer-node-a", &[(KEY, &text)])).unwrap_err();
            assert!(problem.contains(words), "{words}: {problem}");
            assert!(problem.contains("balancer/balancer-node-a"), "{problem}");
        }
    }

    #[test]
    fn every_number_of_a_backend_is_bounded() {
        let group = node_report().peaks[0].group.clone();
        let backend = json!({
            "group": group, "pod": {"namespace": "sw", "name": "oap-0"}, "uid": "u", "slot": 3,
            "address": "10.0.0.1", "state": "active", "established": 7, "exempt": 1, "pending": 0,
            "quota": 9, "room": 2, "moving": 3, "returning": 4,
        });
        let report = |backend: &serde_json::Value| {
            let report = json!({"schema": SCHEMA, "node": "node-a", "backends": [backend],
                "peaks": [], "refused": []});
            parse(&map("balancer-node-a", &[(KEY, &report.to_string())]))
        };
        assert!(report(&backend).is_ok());
        // That of an older daemon.
        let mut older = backend.clone();
        let fields = older.as_object_mut().unwrap();
        fields.retain(|field, _| field != "moving" && field != "returning");
        let told = report(&older).unwrap().backends.remove(0);
        assert_eq!((told.moving, told.returning, told.drained), (0, 0, false));
        let mut sick = backend.clone();
        sick["health"] = json!({"state": "hung", "seconds": 31_536_001});
        let problem = report(&sick).unwrap_err();
        assert!(
            problem.contains("backends[0].health.seconds is 31536001"),
            "{problem}"
        );
        sick["health"] = json!({"state": "x".repeat(254), "seconds": 1});
        let problem = report(&sick).unwrap_err();
        assert!(
            problem.contains("backends[0].health.state has 254 bytes"),
            "{problem}"
        );
        for (field, value) in backend.as_object().unwrap() {
            if value.is_number() {
                let mut other = backend.clone();
                other[field] = json!(u32::MAX);
                let problem = report(&other).unwrap_err();
                let words = format!("backends[0].{field} is 4294967295");
                assert!(problem.contains(&words), "{words}: {problem}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_listed_again_has_not_arrived_again() {
        let mut object = map("balancer-node-a", &[]);
        let first = StoredReport::digest(&object, None, Heard::Watched).unwrap();
        tokio::time::advance(Duration::from_secs(60)).await;
        let again = StoredReport::digest(&object, Some(&first), Heard::Listed);
        assert_eq!(again.unwrap(), first);
        object.metadata.resource_version = Some("8".to_owned());
        let newer = StoredReport::digest(&object, Some(&first), Heard::Watched);
        assert_eq!(newer.unwrap().at, Instant::now());
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_there_before_is_as_old_as_the_api_server_says_and_what_comes_is_new() {
        let clock = ServerClock::default();
        let age = |object: &ConfigMap, heard, clock: &ServerClock| {
            StoredReport::digest(object, None, heard)
                .unwrap()
                .age(clock)
        };
        let mut object = map("balancer-node-a", &[]);
        assert_eq!(age(&object, Heard::Listed, &clock), STALE, "nobody tells");
        let manager =
            |time: &str| json!({"manager": "balancer", "operation": "Apply", "time": time});
        object.metadata.managed_fields = Some(
            [
                manager("2026-11-29T05:00:00Z"),
                manager("2026-11-29T04:00:00Z"),
            ]
            .map(|entry| serde_json::from_value(entry).unwrap())
            .to_vec(),
        );
        assert_eq!(
            age(&object, Heard::Listed, &clock),
            STALE,
            "it tells no time"
        );
        let mut headers = http::HeaderMap::new();
        let date = http::HeaderValue::from_static("Sun, 29 Nov 2026 05:00:25 GMT");
        headers.insert(http::header::DATE, date);
        clock.note(&headers);
        let seconds = Duration::from_secs;
        assert_eq!(age(&object, Heard::Listed, &clock), seconds(25));
        assert_eq!(age(&object, Heard::Watched, &clock), seconds(0));
        let listed = StoredReport::digest(&object, None, Heard::Listed).unwrap();
        tokio::time::advance(seconds(40)).await;
        assert_eq!(listed.age(&clock), seconds(65));
    }
}
