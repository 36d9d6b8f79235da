//! A quota rule in words that are other ones after each change of the rule: then what was computed
//! by the old one is forgotten, and quotas go down at once.

use crate::config::{ClusterInput, ClusterQuota, PodClass};

/// The rule in words, on one line and in less than 128 bytes. Classes of pods would take more: a
/// number stands for them.
pub fn rule(quota: &ClusterQuota) -> String {
    match quota {
        ClusterQuota::Shared {
            input: ClusterInput::Pods(classes),
            ..
        } => format!("{quota} (classes {:08x})", fingerprint(classes)),
        _ => quota.to_string(),
    }
}

/// FNV-1a, which is the same in each build.
fn fingerprint(classes: &[PodClass]) -> u32 {
    let text = classes.iter().map(|class| {
        let namespace = class.namespace.as_deref().unwrap_or_default();
        format!("{namespace}/{} {}\n", class.selector, class.connections)
    });
    let text: String = text.collect();
    let add = |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(16_777_619);
    text.bytes().fold(2_166_136_261, add)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(namespace: Option<&str>, selector: &str, connections: u32) -> PodClass {
        PodClass {
            namespace: namespace.map(str::to_owned),
            selector: selector.to_owned(),
            connections,
        }
    }

    fn of(classes: Vec<PodClass>) -> String {
        rule(&ClusterQuota::Shared {
            input: ClusterInput::Pods(classes),
            headroom_percent: 1_000,
            min_quota: 100_000_000,
        })
    }

    #[test]
    fn each_change_of_a_class_is_another_rule_within_the_maps_room() {
        let all = [
            class(None, "agent=java", 1),
            class(None, "agent=java", 2),
            class(None, "agent=go", 1),
            class(Some("shop"), "agent=java", 1),
        ];
        let words: Vec<String> = all.iter().map(|one| of(vec![one.clone()])).collect();
        for (index, one) in words.iter().enumerate() {
            assert!(one.len() < 128, "{one}");
            assert!(!words[index + 1..].contains(one), "{one}");
        }
        assert_eq!(words[0], of(vec![all[0].clone()]), "always the same");
        assert_eq!(rule(&ClusterQuota::Fixed(5)), "5 for each backend");
    }
}
