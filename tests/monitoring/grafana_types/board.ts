// A dashboard as our script writes it: the types of its panels and queries are filled in where @grafana/schema has `unknown`.
import type { Dashboard, DataQuery, GraphFieldConfig, Panel } from "@grafana/schema";
import type * as stat from "@grafana/schema/dist/types/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen.d.ts";
import type * as timeseries from "@grafana/schema/dist/types/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen.d.ts";

// JSON has the values of enums, not their names.
type Plain<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;

interface Query extends DataQuery {
  datasource: { type: "prometheus"; uid: "prometheus" };
  expr: string;
  legendFormat: string;
}

type Of<Type extends string, Options, Custom> = Omit<Panel<Record<string, never>, Partial<Custom>>, "type" | "options" | "targets"> & {
  type: Type;
  options: Partial<Options>;
  targets: Query[];
};

export type Board = Plain<
  Omit<Dashboard, "panels"> & {
    panels: (Of<"timeseries", timeseries.Options, GraphFieldConfig> | Of<"stat", stat.Options, Record<string, never>>)[];
  }
>;
